"""Folders are layers: a module imports from its own layer and lower ones only, also inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "megatron_iwsft"

# From the bottom up. A module may import from its own layer and those before it.
LAYERS = [
    *(
        "errors",
        "version",
        "utils",
        "data",
        "data.prepare",
        "objectives",
        "ops",
        "hf",
        "distributed",
        "config",
        "model",
    ),
    *("reference", "checkpoint", "convert", "evaluate", "train", "report", "experiments", "testing", "cli", "__main__"),
]
# These import neither Megatron-Core nor torch.distributed: they are usable in any training loop.
FREE = ["objectives", "data/batch.py", "data/packing.py", "hf/mapping.py"]
# These import no torch either: configs are checked, and layouts searched, before it is loaded.
WITHOUT_TORCH = [
    *("errors.py", "version.py", "__init__.py", "utils", "config", "objectives/functions.py", "objectives/metrics.py"),
    *("distributed/parallel_layout.py", "distributed/fp8_recipes.py", "hf/architecture.py", "model/memory.py"),
    *("hf/config_class.py", "hf/config_keys.py", "hf/quantization.py", "hf/rope.py"),
    "checkpoint/names.py",
]
# The only modules that may ask Megatron-Core for the process groups: mcore_compat for the names that it keeps private.
ASK_FOR_GROUPS = {"distributed/context.py", "distributed/mcore_compat.py"}


def modules(*parts: str) -> list[Path]:
    found = [
        path
        for part in parts
        for path in ([PACKAGE / part] if part.endswith(".py") else (PACKAGE / part).rglob("*.py"))
    ]
    assert found
    return sorted(found)


def imports(path: Path, *, typing_only: bool = True, in_functions: bool = True) -> set[str]:
    """Dotted names that a module imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if not typing_only and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
        if not in_functions and isinstance(node, ast.FunctionDef):
            skipped |= {id(inner) for inner in ast.walk(node)}
    out: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            out |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def layer_of(name: str) -> int | None:
    """Of a module of the package, by its dotted name below it."""
    fits = [layer for layer in LAYERS if name == layer or name.startswith(f"{layer}.")]
    return LAYERS.index(max(fits, key=len)) if fits else None


@pytest.mark.parametrize(
    "path", [p for p in modules(".") if p != PACKAGE / "__init__.py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_are_from_the_same_or_a_lower_layer(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    own = layer_of(name)
    assert own is not None, f"{name} belongs to no layer of LAYERS"
    for imported in imports(path):
        if imported.startswith("megatron_iwsft."):
            below = layer_of(imported.removeprefix("megatron_iwsft."))
            assert below is not None and below <= own, f"{name} imports {imported}, which is above it"


@pytest.mark.parametrize("path", modules(*FREE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_mathematics_imports_neither_megatron_core_nor_torch_distributed(path: Path) -> None:
    assert not {i for i in imports(path) if i.startswith(("megatron.", "torch.distributed"))}


@pytest.mark.parametrize("path", modules(*WITHOUT_TORCH), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_checking_a_config_imports_no_torch(path: Path) -> None:
    assert not {i for i in imports(path, typing_only=False, in_functions=False) if i.split(".")[0] == "torch"}


def test_parallel_state_is_read_in_two_modules() -> None:
    asking = {str(p.relative_to(PACKAGE)) for p in modules(".") if any("parallel_state" in i for i in imports(p))}
    assert asking == ASK_FOR_GROUPS


def test_no_two_classes_have_the_same_name() -> None:
    """Except sections of the config schema, which are named after their keys."""
    classes: dict[str, list[str]] = {}
    for path in modules("."):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_section = isinstance(node, ast.ClassDef) and "Section" in {ast.unparse(base) for base in node.bases}
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not is_section:
                classes.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in classes.items() if len(paths) > 1} == {}


def forks(source: str) -> list[int]:
    """Lines that fork this process: by name, by start method, or by leaving the start method to Python, whose default forks."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, arguments = ast.unparse(node.func), [*node.args, *(keyword.value for keyword in node.keywords)]
        named = any(isinstance(value, ast.Constant) and value.value == "fork" for value in arguments)
        by_default = name.endswith("ProcessPoolExecutor") and "context" not in ast.unparse(node)
        by_default |= name in ("mp.Process", "mp.Pool", "multiprocessing.Process", "multiprocessing.Pool")
        direct = name in ("os.fork", "os.forkpty") or any(keyword.arg == "preexec_fn" for keyword in node.keywords)
        if direct or named or by_default:
            found.append(node.lineno)
    return found


def test_nothing_forks() -> None:
    """A fork of a process that uses CUDA must not touch it: only Megatron-Core's checkpoint writer forks, with tensors on the host."""
    assert forks("os.fork(); get_context('fork'); ProcessPoolExecutor(4); get_context('spawn')") == [1, 1, 1]
    found = {str(path.relative_to(PACKAGE)): forks(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}
