"""Every message with which the program refuses something: the `raise` statements of user errors, read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_iwsft"
KINDS = ("ConfigError", "DataError", "CheckpointError", "DivergenceError", "UserError")
OF_KIND = {"DamageError": "CheckpointError"} | {
    kind: kind for kind in KINDS
}  # class → under which its messages are listed
HOLE = "…"  # what is filled in when it is raised


@dataclass(frozen=True)
class Message:
    """text: with `…` for what is filled in. where: path:line. holes: the expressions that fill it."""

    kind: str
    text: str
    path: str
    line: int
    function: str
    holes: tuple[str, ...]


def messages() -> Iterator[Message]:
    """Of every `raise KIND(text)` in the package whose text is written there, and of the config's validators, by file and line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _constants(tree)
        for function, node in _raises(tree):
            call = node.exc
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args):
                continue
            of_field = call.func.id == "ValueError" and path.parent == PACKAGE / "config"
            if not of_field and call.func.id not in OF_KIND:
                continue
            holes: list[str] = []
            text = _text(call.args[0], constants | _locals(function), holes)
            name = function.name if function else ""
            if of_field:  # pydantic's: the loader puts file and section before it
                text = f"{HOLE}: {text}."
            yield Message(
                "ConfigError" if of_field else OF_KIND[call.func.id],
                re.sub(r"\s+", " ", text).strip(),
                str(path.relative_to(ROOT)),
                node.lineno,
                name,
                tuple(holes),
            )


def _raises(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | None, ast.Raise]]:
    def walk(node: ast.AST, function: ast.FunctionDef | None) -> Iterator[tuple[ast.FunctionDef | None, ast.Raise]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Raise):
                yield function, child
            yield from walk(child, child if isinstance(child, ast.FunctionDef) else function)

    return walk(tree, None)


def _constants(tree: ast.AST) -> dict[str, ast.expr]:
    """Names of the module that are given a text."""
    body = tree.body if isinstance(tree, ast.Module) else list(ast.walk(tree))
    return {
        target.id: node.value
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp)
    }


def _locals(function: ast.FunctionDef | None) -> dict[str, ast.expr]:
    return _constants(function) if function else {}


def _text(node: ast.expr, names: dict[str, ast.expr], holes: list[str]) -> str:
    """The text of an expression; of two alternatives, the first that has text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names, holes) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names, holes)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names, holes) + _text(node.right, names, holes)
    if isinstance(node, ast.IfExp):
        return _text(node.body, names, holes) or _text(node.orelse, names, holes)
    if isinstance(node, ast.Name) and node.id in names:
        return _text(names[node.id], {k: v for k, v in names.items() if k != node.id}, holes)
    holes.append(ast.unparse(node))
    return HOLE
