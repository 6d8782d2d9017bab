"""The environment variables that torchrun sets in the processes it starts."""

import os


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes files and reports."""
    return int(os.environ.get("RANK", "0")) == 0
