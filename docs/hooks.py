"""Makes files outside docs/ pages of the site, so that one relative link is right on GitHub and on the site.

README.md is the first page. Every other file that a page links to lies under repository/: Markdown as it is, source as
a block of code.
"""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()[^)\s:#]+(?=[)\s#])")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp", ".cuh": "cpp", ".toml": "toml", ".yml": "yaml"}
IMAGES = (".svg", ".png")


def page_of(path: str) -> str:
    """Where in the site a file of the repository lies."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and path.endswith((".md", *IMAGES)):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def linked(path: str, text: str) -> dict[str, str]:
    """The files of the repository that the Markdown file at `path` links to, by the link as it is written."""
    targets = {link: normpath(f"{dirname(path)}/{link}".lstrip("/")) for link in LINK.findall(text)}
    return {link: target for link, target in targets.items() if (ROOT / target).is_file()}


def content_of(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n`````{language}\n{text}`````\n"


def on_files(files: Files, config: Any) -> Files:
    """Adds README.md and what pages link to, and what those link to in turn."""
    waiting = ["README.md", *(f"docs/{f.src_uri}" for f in files.documentation_pages())]
    for path in waiting:
        if not files.get_file_from_path(page_of(path)):
            files.append(File.generated(config, page_of(path), content=content_of(path)))
        if path.endswith(".md"):
            found = linked(path, (ROOT / path).read_text(encoding="utf-8")).values()
            waiting += [target for target in dict.fromkeys(found) if target not in waiting]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    path = {"index.md": "README.md"}.get(here) or (
        here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}"
    )
    targets = linked(path, markdown)

    def rewritten(link: re.Match[str]) -> str:
        target = targets.get(link[0])
        return relpath(page_of(target), dirname(here)) if target else link[0]

    return LINK.sub(rewritten, markdown)
