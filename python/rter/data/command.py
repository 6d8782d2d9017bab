"""`rter data fetch NAME` and `rter data make-cifar-digits`."""

import argparse
from pathlib import Path
from typing import Any

from rter.data.archives import ARCHIVES

DESCRIPTION = """Fetches the files that `rter train --data NAME --data-dir DIR` reads:
  digits          none, they come with scikit-learn
  cifar10         170 MB; `fetch cifar10-python` fetches the same images in Python's format
  svhn            240 MB
  tiny-imagenet   240 MB
  image-folder    your own: DIR/train/<class>/* with DIR/test/<class>/*, or DIR/<class>/* alone
Without a network, `fetch NAME` says which file to put where. docs/data.md has more."""


def add_command(commands: Any) -> None:
    """Adds `data` to the subparsers of the command line."""
    data = commands.add_parser("data", help="fetch a data set", description=DESCRIPTION,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetching = actions.add_parser("fetch", help="download, check and unpack a data set; resumes if interrupted")
    fetching.add_argument("name", choices=tuple(ARCHIVES), metavar="NAME", help=f"one of {', '.join(ARCHIVES)}")
    fetching.set_defaults(run=_fetch)
    making = actions.add_parser("make-cifar-digits", help="write the digits, 3x32x32, in CIFAR-10's binary format")
    making.set_defaults(run=_make_digits)
    for parser in (fetching, making):
        parser.add_argument("--data-dir", type=_folder, default=Path("data"), metavar="DIR", help="folder to write to "
                            "(default: data)")  # fmt: skip


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, but {text} is a file")
    return Path(text)


def _fetch(args: argparse.Namespace) -> None:
    from rter.data.fetch import fetch

    for archive in ARCHIVES[args.name]:
        print(f"ready: {fetch(archive, args.data_dir)}")


def _make_digits(args: argparse.Namespace) -> None:
    from rter.data.cifar10 import make_digits

    print(f"written: {make_digits(args.data_dir)}; next: rter train --data cifar10 --data-dir {args.data_dir}")
