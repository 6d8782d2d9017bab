"""The wheel is enough to run the README; the sdist contains all that a wheel is built from."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from moe_kernels import _C

ROOT = Path(__file__).parent.parent
TREE = ["MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "pyproject.toml", "setup.py", "csrc"]
PACKAGES = {"moe_kernels": ROOT / "moe_kernels", "rter": ROOT / "python/rter"}


def modules() -> set[str]:
    """The path in a wheel of every Python file of both packages."""
    return {f"{name}/{p.relative_to(folder)}" for name, folder in PACKAGES.items() for p in folder.rglob("*.py")}


def call(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the work tree, whose objects are compiled already."""
    folder = tmp_path_factory.mktemp("wheel")
    for stale in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")]:
        shutil.rmtree(stale)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-w", folder]
    call(sys.executable, "-m", "pip", "wheel", "-q", *options, ROOT)
    return next(folder.glob("moe_kernels-*.whl"))


def test_the_wheel_contains_every_module_and_nothing_else(wheel: Path) -> None:
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert {n for n in held if n.endswith(".py")} == modules()
    libraries = {re.sub(r"\..*", "", n) for n in held if not n.endswith(".py")} - {"moe_kernels/_cuda"}
    assert libraries == {"moe_kernels/_C", *(f"moe_kernels/_cpu_{re.sub('-', '_', x)}" for x in _C.cpu_levels.split())}


def test_the_readme_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment that sees this one's other packages, and outside the repository."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    packages = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--ignore-installed",
        "--no-deps",
        "--no-index",
        wheel,
    )
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "tests/test_readme.py", tmp_path / "tests")
    place = "import moe_kernels, rter; print(moe_kernels.__file__, rter.__file__)"
    assert all(Path(p).is_relative_to(packages) for p in call(python, "-I", "-c", place, cwd=tmp_path).split())
    said = call(python, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "tests", cwd=tmp_path)
    assert re.search(r"^[1-9]\d* passed in", said, re.M) and "skipped" not in said, said
    assert "rt-er" in call(tmp_path / "env/bin/rter", "train", "--help", cwd=tmp_path)


def test_the_sdist_contains_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    call(sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {n.partition("/")[2] for n in archive.getnames()}
    files = [p for name in TREE for p in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
    files += [p for folder in PACKAGES.values() for p in folder.rglob("*.py")]
    assert held >= {str(p.relative_to(ROOT)) for p in files if p.is_file()}


@pytest.mark.parametrize("installed", [True, False])
def test_an_isolated_build_requires_torch_only_if_it_is_missing(installed: bool, tmp_path: Path) -> None:
    """pip builds where none of the user's packages can be imported; setup.py finds the user's torch by its path."""
    packages = Path(sysconfig.get_path("purelib"))
    (tmp_path / "backend").mkdir()
    for part in packages.glob("setuptools*"):
        (tmp_path / "backend" / part.name).symlink_to(part)
    for name in [*TREE, "moe_kernels", "python"]:
        (tmp_path / name).symlink_to(ROOT / name)
    script = f"""
import site, sys
sys.path[:] = [p for p in sys.path if not p.endswith("site-packages")] + [{str(tmp_path / "backend")!r}]
site.getsitepackages, site.getusersitepackages = lambda: {[str(packages)] * installed}, lambda: "none"
from setuptools import build_meta
print("requires", build_meta.get_requires_for_build_wheel())
"""
    said = call(sys.executable, "-I", "-c", script, cwd=tmp_path)
    assert f"requires {[] if installed else ['torch>=2.11']}" in said
