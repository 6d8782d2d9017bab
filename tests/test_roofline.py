"""docs/roofline.md is what its script writes, and the cost model counts the operations that it claims to count."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_is_up_to_date() -> None:
    script = [sys.executable, ROOT / "benchmarks/roofline.py"]
    written = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert written == (ROOT / "docs/roofline.md").read_text()
    rows = {line.split(" | ")[0]: line.split(" | ") for line in written.splitlines()}
    # 2 * 20 forwards and input gradients of 512 images, and 3 * 3 of training, at 0.56 GMAC an image.
    assert abs(float(rows["| RT-ER step"][3]) - 2 * 0.556 * 512 * (2 * 20 + 3 * 3)) < 100
