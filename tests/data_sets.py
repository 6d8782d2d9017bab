"""Checks of data sets that several test files share."""

from pathlib import Path

import pytest
from rter.data.load import load_data
from rter.errors import UserError


def refused(name: str, folder: Path, *parts: str, held_out: int = 2) -> str:
    with pytest.raises(UserError) as error:
        load_data(name, held_out, 0, str(folder))
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    return message
