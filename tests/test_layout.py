"""The layout of the project: imports run one way, and every operator has all of its files."""

import ast
import graphlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
OPS = sorted(p.stem for p in (ROOT / "moe_kernels/ops").glob("*.py") if p.stem != "__init__")

# folder: the parts of this project that its files may import
MAY_IMPORT = {
    "moe_kernels/reference": ("moe_kernels.reference",),
    "moe_kernels/triton_kernels": ("moe_kernels._layout", "moe_kernels.triton_kernels"),
    "moe_kernels/ops": (
        "moe_kernels._checks",
        "moe_kernels._deprecated",
        "moe_kernels._layout",
        "moe_kernels._library",
        "moe_kernels._recipes",
        "moe_kernels._torch",
        "moe_kernels.backends",
        "moe_kernels.ops",
        "moe_kernels.reference",
    ),
    "moe_kernels/nn": (
        "moe_kernels._checks",
        "moe_kernels._deprecated",
        "moe_kernels._fsdp",
        "moe_kernels._layout",
        "moe_kernels._library",
        "moe_kernels._recipes",
        "moe_kernels._torch",
        "moe_kernels.nn",
        "moe_kernels.ops",
    ),
    "moe_kernels/attacks": (
        "moe_kernels._checks",
        "moe_kernels._fsdp",
        "moe_kernels._layout",
        "moe_kernels._library",
        "moe_kernels._recipes",
        "moe_kernels._torch",
        "moe_kernels.attacks",
        "moe_kernels.backends",
        "moe_kernels.ops",
    ),
    "moe_kernels/distributed": (
        "moe_kernels._torch",
        "moe_kernels.distributed",
        "moe_kernels.nn",
        "moe_kernels.ops",
    ),
    "moe_kernels/integrations": (
        "moe_kernels._checks",
        "moe_kernels._torch",
        "moe_kernels.backends",
        "moe_kernels.nn",
        "moe_kernels.ops",
    ),
    "python/rter": ("moe_kernels", "rter"),
}
EXTENSIONS = {"moe_kernels._C"}  # modules that no file of Python makes
OURS = ("moe_kernels", "rter", "tests", "benchmarks", "checks")


def imported(path: Path) -> set[str]:
    """Dotted names of this project that a file imports; `from moe_kernels import x` counts as moe_kernels.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" for a in node.names} if module == "moe_kernels" else {module}
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imported(path):
            if folder == "python/rter":  # the application uses public names only
                allowed = name.split(".")[0] == "rter" or (name.count(".") <= 1 and "._" not in name)
            else:
                allowed = any(name == a or name.startswith(a + ".") for a in MAY_IMPORT[folder])
            assert allowed, f"{path.relative_to(ROOT)} must not import {name}"


def modules_run(name: str, path: Path, files: dict[str, Path]) -> set[str]:
    """The modules among `files` that a module's imports run, including imports in functions and for annotations: the
    imported modules and every package around them, apart from the packages around the module itself."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= {module if module in files.keys() | EXTENSIONS else str(node.module) for module in inside}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            named |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    parts = [module.split(".") for module in named]
    around = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
    return (named | {package for package in around if not f"{name}.".startswith(f"{package}.")}) & files.keys()


def test_imports_have_no_circle() -> None:
    files = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for folder, package in ((ROOT, "moe_kernels"), (ROOT / "python", "rter"))
        for path in (folder / package).rglob("*.py")
    }
    graph = {name: modules_run(name, path, files) for name, path in files.items()}
    assert {"rter.config", "rter.settings", "rter.methods", "moe_kernels"} <= graph["rter.parser"]
    assert {"moe_kernels._library", "moe_kernels.reference"} <= graph["moe_kernels.backends"]
    assert not graph["rter.seeds"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(f"a circle: {' is imported by '.join(circle.args[1])}")


# Classes and objects of torch that this project uses; torch may change any of their attributes with an underscore.
PRIVATE = {
    name
    for thing in (
        torch.Tensor,
        torch.UntypedStorage,
        nn.Module(),
        nn.parallel.DistributedDataParallel,
        torch.ops.aten.add,
    )
    for name in dir(thing)
    if name.startswith("_") and not name.endswith("__")
}


def private_to_torch(path: Path, own: set[str]) -> list[str]:
    """The private names of torch that a file uses: in imports, after a name of torch's, or as attributes of torch's
    objects, also as strings; `own` are the attributes that this project itself defines."""
    tree, found, torch_names = ast.parse(path.read_text()), [], {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
            torch_names |= {alias.asname or alias.name for alias in node.names}
            found += [n for a in node.names if "._" in (n := f"{node.module}.{a.name}")]
        elif isinstance(node, ast.Import):
            inside = [alias for alias in node.names if alias.name.split(".")[0] == "torch"]
            torch_names |= {alias.asname or "torch" for alias in inside}
            found += [alias.name for alias in inside if "._" in alias.name]
        elif isinstance(node, ast.Assign) and root(node.value) == "torch":
            torch_names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            if root(node) in torch_names or (node.attr in PRIVATE and node.attr not in own):
                found.append(f"{ast.unparse(node)} in line {node.lineno}")
        elif isinstance(node, ast.Constant) and node.value in PRIVATE - own:
            found.append(f"{node.value!r} in line {node.lineno}")
    return found


def root(node: ast.AST) -> str | None:
    """`a` of a.b.c"""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def test_private_names_of_torch_are_in_one_file() -> None:
    paths = [*(ROOT / "moe_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    allowed = ROOT / "moe_kernels/_torch.py"
    assert len(private_to_torch(allowed, own)) > 20
    found = {str(path.relative_to(ROOT)): private_to_torch(path, own) for path in paths if path != allowed}
    assert not {path: names for path, names in found.items() if names}


def test_names_imported_across_files_have_no_underscore() -> None:
    folders = ("moe_kernels", "python", "tests", "benchmarks", "checks")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("moe_kernels.", "rter.")):
                names = [alias.name for alias in node.names]
                private = [name for name in names if name.startswith("_") and not name.endswith("__")]
                assert not private, f"{path.relative_to(ROOT)} imports {private} from {node.module}"


def test_nothing_imports_tests_benchmarks_or_checks() -> None:
    testing = ROOT / "moe_kernels/testing"
    for path in [*(ROOT / "moe_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]:
        if testing in path.parents:
            continue
        for name in imported(path):
            outside = name.split(".")[0] in ("tests", "benchmarks", "checks")
            forbidden = outside or name.startswith("moe_kernels.testing")
            assert not forbidden, f"{path.relative_to(ROOT)} must not import {name}"


@pytest.mark.parametrize(
    "name", ["attack", "evaluation", "suite", "sanity", "autoattack", "evaluate", "api", "journal"]
)
def test_evaluation_takes_nothing_from_training(name: str) -> None:
    training = ("rter.methods", "rter.train", "rter.optimisation", "rter.resume")
    assert not [found for found in imported(ROOT / f"python/rter/{name}.py") if found.startswith(training)]


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_all_its_files(op: str) -> None:
    for path in (f"moe_kernels/reference/{op}.py", f"csrc/cpu/{op}.cpp", f"tests/test_{op}.py"):
        assert (ROOT / path).exists(), path


def headers_of(folder: str) -> set[str]:
    """The headers of csrc/ that the files of one of its folders include, themselves or through others."""
    found: set[str] = set()
    todo = [*(ROOT / "csrc" / folder).iterdir()]
    while todo:
        named = set(re.findall(r'#include "(.*)"', todo.pop().read_text())) - found
        found |= named
        todo += [ROOT / "csrc" / name for name in named]
    return found


def test_what_cpu_and_cuda_share_is_in_common() -> None:
    both = headers_of("cpu") & headers_of("cuda")
    assert both == {f"common/{path.name}" for path in (ROOT / "csrc/common").iterdir()}
