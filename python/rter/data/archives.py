"""The data sets that can be fetched, and the addresses of their files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """A file to download. `unpacked` is the folder inside it, or None for a file that is used as it is."""

    url: str
    md5: str
    unpacked: str | None = None

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[1]


CIFAR = "https://www.cs.toronto.edu/~kriz"
SVHN = "http://ufldl.stanford.edu/housenumbers"
ARCHIVES = {
    "cifar10": [Archive(f"{CIFAR}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin")],
    "cifar10-python": [
        Archive(f"{CIFAR}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py")
    ],
    "svhn": [
        Archive(f"{SVHN}/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        Archive(f"{SVHN}/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    ],
    "tiny-imagenet": [
        Archive(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", "tiny-imagenet-200"
        )
    ],
}
