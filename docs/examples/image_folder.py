"""Writes scikit-learn's digits as a folder of PNG files for each class: `python docs/examples/image_folder.py photos`.

They stand in for images of your own where a page needs some: photos/train/CLASS/*.png and photos/test/CLASS/*.png.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(folder: Path, size: int = 32, held_out: int = 360) -> None:
    data = load_digits()
    for i, (pixels, digit) in enumerate(zip(data.images, data.target, strict=True)):
        place = folder / ("test" if i < held_out else "train") / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        grey.convert("RGB").resize((size, size), Image.Resampling.BILINEAR).save(place / f"{i:04}.png")
    print(f"written: {folder}, {len(data.images)} images of {size} x {size} in {len(data.target_names)} classes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
