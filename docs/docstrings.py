"""An extension of griffe, which reads the docstrings: the code of an `Example:` is a block of Python on the site."""

import re
from textwrap import indent
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)


class CodeOfExamples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(as_block, obj.docstring.value)


def as_block(example: re.Match[str]) -> str:
    return "Example:\n" + indent("```python\n", " " * 4) + example[1].rstrip() + "\n" + indent("```\n", " " * 4)
