"""The arguments of `rter evaluate --model`, which are checked before anything large is imported."""

import argparse

from rter.data import DATASETS
from rter.errors import UserError, did_you_mean
from rter.strength import BATCH, NORMS, make_strength

EVALUATE = """Attacks a model and writes report.json: that of a RUN, a folder made by `rter train`, or, with --model,
the module that a function returns. An evaluation that was killed resumes when its command is repeated."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rter evaluate --model`."""
    group = parser.add_argument_group("for a model that is not from a run")
    group.add_argument("--model", metavar="FILE.py:FUNCTION", help="function without arguments that returns a module "
                       "from images in [0, 1] to logits")  # fmt: skip
    group.add_argument("--data", metavar="NAME", help=f"one of {', '.join(DATASETS)}; its test images, or all of them "
                       "where it has no test split")  # fmt: skip
    group.add_argument("--image-size", metavar="N", help="pixels to which images in separate files are scaled")
    group.add_argument("--eps", metavar="EPS", help="radius of the perturbation, such as 8/255")
    group.add_argument("--norm", metavar="NORM", help=f"one of {', '.join(NORMS)} (default: Linf)")
    group.add_argument("--batch-size", metavar="N", help="images that are attacked at a time (default: 512)")
    group.add_argument("--seed", metavar="N", help="seed of all random starts and of the choice of images (default: 0)")


ARGUMENTS = ("data", "image_size", "eps", "norm", "batch_size", "seed")


def check_model_arguments(args: argparse.Namespace) -> None:
    """Checks that either a run is given, or a model with its arguments."""
    if (args.run_folder is None) == (args.model is None):
        raise UserError(f"give either a RUN or --model FILE.py:FUNCTION, got {'both' if args.model else 'neither'}")
    if args.model is None:
        for name in ARGUMENTS:
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --model; a RUN has its own")
        if args.weights not in (None, "last", "best"):
            raise UserError(f"--weights must be last or best for a RUN, got {args.weights!r}")
        return
    for name in ("data", "eps", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} must be given with --model")
    if args.data not in DATASETS:
        raise UserError(
            f"--data must be one of {', '.join(DATASETS)}, got {args.data!r}{did_you_mean(args.data, DATASETS)}"
        )
    for name in ("image_size", "batch_size", "seed"):
        text = getattr(args, name)
        if text is not None and not text.isdecimal():
            raise UserError(f"--{name.replace('_', '-')} must be a whole number, got {text!r}")
    make_strength(
        args.eps,
        args.norm or "Linf",
        args.suite,
        (0, 1),
        int(args.batch_size or BATCH),
        int(args.seed or 0),
        args.steps,
        args.restarts,
        args.queries,
    )
