"""Which keys of a `config.json` a family's own class in `transformers` reads, and their defaults: from the installed package's source.

The source is parsed, not imported: `transformers` imports torch, and configs are checked before that.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

from megatron_iwsft.errors import CheckpointError

DEFAULT_THETA = "default_theta"  # the default of `rope_theta` since transformers 5, where no key declares one


@dataclass(frozen=True)
class ConfigClass:
    """A configuration class of `transformers`.

    defaults  what a key is if the config does not set it, for each key that the class or its base declares; None if only code can tell
    read      keys on which the class itself or the family's model code depends
    common    keys that every configuration class knows
    """

    defaults: dict[str, Any]
    read: frozenset[str]
    common: frozenset[str]


@lru_cache
def config_class(model_type: str, folder: str) -> ConfigClass:
    """The class for `model_type`, in `transformers/models/FOLDER`. Raises CheckpointError if the installed version has none."""
    root = _package()
    files = [root / "models" / folder / f"{kind}_{folder}.py" for kind in ("configuration", "modeling")]
    if not all(file.is_file() for file in files):
        raise CheckpointError(
            f"transformers {_version()} has no model_type {model_type!r}. Install a newer one: pip install -U transformers."
        )
    configuration, modeling = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    own = next(node for node in _classes(configuration) if _declares_type(node, model_type))
    base = next(node for node in _classes(ast.parse((root / "configuration_utils.py").read_text())) if _is_base(node))
    return ConfigClass(
        defaults=dict(_popped(base)) | dict(_declared(own)),
        read=frozenset(_read(modeling, "config")) | frozenset(_read(own, "self", "kwargs")),
        common=frozenset(_read(base, "self", "kwargs")) | frozenset(name for name, _ in _declared(base)),
    )


@lru_cache
def rope_keys(kind: str) -> frozenset[str]:
    """Keys of `rope_parameters` that `transformers` reads for a rope type."""
    tree = ast.parse((_package() / "modeling_rope_utils.py").read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if _assigns(node, "ROPE_INIT_FUNCTIONS"))
    assert isinstance(table, ast.Dict)
    names = {ast.unparse(value) for key, value in zip(table.keys, table.values, strict=True) if kind in _text(key)}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    owners = ("rope_parameters_dict", "rope_parameters", "rope_scaling")
    return frozenset(key for function in functions for key in _read(function, *owners))


def _assigns(node: ast.stmt, name: str) -> TypeGuard[ast.Assign | ast.AnnAssign]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(ast.unparse(target) == name for target in targets)


def _package() -> Path:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise CheckpointError("the package `transformers` is not installed: pip install transformers.")
    return Path(spec.origin).parent


def _version() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "(of an unknown version)"


def _classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in tree.body if isinstance(node, ast.ClassDef))


def _is_base(node: ast.ClassDef) -> bool:
    return node.name in ("PreTrainedConfig", "PretrainedConfig")  # since transformers 5, and before


def _declares_type(node: ast.ClassDef, model_type: str) -> bool:
    return any(
        isinstance(item, ast.Assign)
        and ast.unparse(item.targets[0]) == "model_type"
        and isinstance(item.value, ast.Constant)
        and item.value.value == model_type
        for item in node.body
    )


def _declared(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """(key, default): annotated fields (transformers 5) or arguments of the constructor (before)."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            if "ClassVar" not in ast.unparse(item.annotation):
                yield item.target.id, _literal(item.value)
        elif isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == DEFAULT_THETA:
            yield DEFAULT_THETA, _literal(item.value)
        elif isinstance(item, ast.FunctionDef) and item.name == "__init__" and item.args.defaults:
            arguments = item.args.args[-len(item.args.defaults) :]
            for argument, value in zip(arguments, item.args.defaults, strict=True):
                yield argument.arg, _literal(value)


def _popped(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """(key, default) of what the class takes out of its keyword arguments: kwargs.pop("key", default)."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and len(call.args) == 2 and _is_method_of(call.func, ("kwargs",)):
            yield from ((key, _literal(call.args[1])) for key in _text(call.args[0]))


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):  # a field with a range: interval(…)(default=0.02)
        node = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # 4096 * 32
        factors = _literal(node.left), _literal(node.right)
        return None if None in factors else factors[0] * factors[1]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _read(tree: ast.AST, *owners: str) -> Iterator[str]:
    """Names read of an object called one of `owners` (or of an attribute of that name): as attribute, item, or by getattr and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _names(node.value, owners):
            yield node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _names(node.value, owners):
            yield from _text(node.slice)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and _names(node.args[0], owners):
            yield from _text(node.args[1])  # getattr(config, "key", …)
        elif isinstance(node, ast.Call) and node.args and _is_method_of(node.func, owners):
            yield from _text(node.args[0])  # kwargs.pop("key", …)


def _is_method_of(node: ast.expr, owners: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Attribute) and _names(node.value, owners)


def _names(node: ast.expr, owners: tuple[str, ...]) -> bool:
    return (isinstance(node, ast.Name) and node.id in owners) or (
        isinstance(node, ast.Attribute) and node.attr in owners
    )


def _text(node: ast.expr | None) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
