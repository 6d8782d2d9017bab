"""The documentation site builds without a warning, has no broken link, and asks nothing of other hosts to be read."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
HOST = "https://site.invalid"
# What a browser fetches by itself, in whatever tag.
FETCHED = {"img": "src", "script": "src", "source": "src", "iframe": "src", "video": "src", "object": "data"}
PUBLIC = ["moe_kernels", "moe_kernels.attacks", "moe_kernels.nn", "moe_kernels.ops", "moe_kernels.distributed"]
# Of operators' forwards and backwards, and lists of what the tests run on.
UNDOCUMENTED = {
    "combine_input_grad",
    "combine_weight_grad",
    "expert_mlp_hidden_grad",
    "expert_sum",
    "index_sum",
    "mask_relu_forward",
    "mask_relu_forward_",
    "pgd_step_normalized_",
    "topk_route_backward",
    "CASES",
    "DTYPES",
    "GROUPS",
}


class Page(HTMLParser):
    """The anchors, links and fetched files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(given["href"])
        if FETCHED.get(tag) in given:
            self.fetched.append(given[FETCHED[tag]])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Every page of the site, by its address."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "SITE_URL": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for path in site.rglob("*.html"):
        address = f"{HOST}/{path.relative_to(site).as_posix()}".removesuffix("index.html")
        found[address] = Page(path.read_text(encoding="utf-8"))
    for path in site.rglob("*"):
        if path.is_file() and path.suffix != ".html":
            found[f"{HOST}/{path.relative_to(site).as_posix()}"] = Page("")
    return found


def test_every_row_of_a_table_has_a_line() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    for file in files:
        lines = file.read_text().splitlines()
        for i, line in enumerate(lines):
            if re.search(r"\| *:?-{2,}", line):
                assert re.fullmatch(r" *\|( *:?-+:? *\|)+", line), f"{file}, line {i + 1}: {line}"
                end = next((j for j in range(i, len(lines)) if not lines[j].lstrip().startswith("|")), len(lines))
                cells = {len(re.findall(r"(?<!\\)\|", row)) for row in lines[i - 1 : end]}
                assert len(cells) == 1, f"{file}, line {i + 1}: rows of {sorted(cells)} cells"


def test_no_link_is_broken(pages: dict[str, Page]) -> None:
    count = 0
    for address, page in pages.items():
        for link in [*page.links, *page.fetched]:
            target, fragment = urldefrag(urljoin(address, link))
            if not target.startswith(HOST) or address.endswith("/404.html"):
                continue
            assert unquote(target) in pages, f"{address} links to {link}"
            if fragment and not fragment.startswith("__"):  # of the theme's own scripts
                assert unquote(fragment) in pages[target].anchors, f"{address} links to {link}"
            count += 1
    assert count > 1000


def test_reading_asks_nothing_of_other_hosts(pages: dict[str, Page]) -> None:
    fetched = {urljoin(address, file) for address, page in pages.items() for file in page.fetched}
    assert len(fetched) > 5 and {urlsplit(file).netloc for file in fetched} == {urlsplit(HOST).netloc}


@pytest.mark.parametrize("module", [*PUBLIC, "moe_kernels.testing", "rter"])
def test_the_reference_has_every_public_name(pages: dict[str, Page], module: str) -> None:
    reference = {a for address, page in pages.items() if "/api/" in address for a in page.anchors}
    documented = {anchor.rpartition(".")[2] for anchor in reference if "." in anchor}
    assert set(importlib.import_module(module).__all__) - documented <= UNDOCUMENTED
