"""Every message with which the program refuses something: each user error that is made in the package, read from the source."""

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
PARAMETER = "error"  # the name of a parameter that is the error class to raise
LEAVE = "_leave"  # (status, text): ends a command, as for an OSError
HOLE = "…"  # what is filled in when it is raised
_MOST = 12  # texts that one expression can have; more are not told apart
_DEPTH = 4  # functions that are followed into each other

Text = tuple[str, tuple[str, ...]]  # with its holes


@dataclass(frozen=True)
class Message:
    """text: with `…` for what is filled in. where: path:line. holes: the expressions that fill it."""

    kind: str
    text: str
    path: str
    line: int
    function: str
    holes: tuple[str, ...]


@dataclass(frozen=True)
class Scope:
    """What names mean where a text is made. functions: every function of the package that returns a text, with its module's names."""

    names: dict[str, ast.expr]
    functions: dict[str, tuple[ast.FunctionDef, dict[str, ast.expr]]]
    depth: int = 0


def messages() -> Iterator[Message]:
    """Of every user error that the package makes, raised there or returned, and of the config's validators, by file and line.

    A message has a line per text that it can have. Texts are followed through constants, alternatives and functions that return one.
    """
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    functions = _functions_of(trees.values())
    for path, tree in trees.items():
        constants = _constants(tree)
        for function, call in _errors(tree):
            of_field = call.func.id == "ValueError" and path.parent == PACKAGE / "config"
            generic = call.func.id == PARAMETER
            ends = call.func.id == LEAVE and ast.unparse(call.args[0]) == "EXIT_USER_ERROR"
            if not (of_field or generic or ends or call.func.id in OF_KIND):
                continue
            for text, holes in _texts(call.args[-1], Scope(constants | _locals(function), functions)):
                yield Message(
                    "ConfigError" if of_field else "UserError" if generic or ends else OF_KIND[call.func.id],
                    # pydantic's: the loader puts file and section before it
                    re.sub(r"\s+", " ", f"{HOLE}: {text.removesuffix('.')}." if of_field else text).strip(),
                    str(path.relative_to(ROOT)),
                    call.lineno,
                    function.name if function else "",
                    holes,
                )


def advice() -> Iterator[tuple[str, str]]:
    """(place, text) of every text that a call passes as `advice`, for the message of the function that is called."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        scope = Scope(_constants(tree), {})
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "advice":
                for text, _ in _texts(node.value, scope):
                    if text not in ("", HOLE):
                        yield f"{path.relative_to(ROOT)}:{node.value.lineno}", text


def _errors(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """Calls of a name with arguments, in or outside a `raise`, and the innermost function around each."""

    def walk(node: ast.AST, function: ast.FunctionDef | None) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.args:
                yield function, child
            yield from walk(child, child if isinstance(child, ast.FunctionDef) else function)

    return walk(tree, None)


def _functions_of(trees: Iterator[ast.Module]) -> dict[str, tuple[ast.FunctionDef, dict[str, ast.expr]]]:
    """Functions and methods that return a text, by name; without names that several have."""
    found: dict[str, list[tuple[ast.FunctionDef, dict[str, ast.expr]]]] = {}
    for tree in trees:
        constants = _constants(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append((node, constants))
    return {
        name: same[0]
        for name, same in found.items()
        if len(same) == 1 and same[0][0].returns and ast.unparse(same[0][0].returns) in ("str", "str | None")
    }


def _constants(tree: ast.AST) -> dict[str, ast.expr]:
    """Names of the module, or of a function, that are given a text."""
    body = tree.body if isinstance(tree, ast.Module) else list(ast.walk(tree))
    kinds = ast.Constant | ast.JoinedStr | ast.BinOp | ast.BoolOp | ast.IfExp | ast.Call
    given = [
        (target.id, node.value)
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, kinds)
    ]
    names = [name for name, _ in given]
    return {name: value for name, value in given if names.count(name) == 1}


def _locals(function: ast.FunctionDef | None) -> dict[str, ast.expr]:
    return _constants(function) if function else {}


def _texts(node: ast.expr, scope: Scope) -> list[Text]:
    """The texts that an expression can have, and in each its holes."""
    if isinstance(node, ast.Constant):
        return [(node.value, ())] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return _joined(node.values, scope)
    if isinstance(node, ast.FormattedValue):
        return _texts(node.value, scope) or [(HOLE, (ast.unparse(node.value),))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([node.left, node.right], scope)
    if isinstance(node, ast.IfExp):
        return _texts(node.body, scope) + _texts(node.orelse, scope)
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return [text for value in node.values for text in _texts(value, scope)]
    if isinstance(node, ast.Name) and node.id in scope.names:
        inner = Scope({k: v for k, v in scope.names.items() if k != node.id}, scope.functions, scope.depth)
        return _texts(scope.names[node.id], inner)
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in scope.functions and scope.depth < _DEPTH:
            function, constants = scope.functions[name]
            inner = Scope(constants | _locals(function), scope.functions, scope.depth + 1)
            returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value is not None]
            found = [text for value in returned for text in _texts(value, inner)]
            if found:
                return found
    return [(HOLE, (ast.unparse(node),))]


def _joined(parts: list[ast.expr], scope: Scope) -> list[Text]:
    out: list[Text] = [("", ())]
    for part in parts:
        texts = _texts(part, scope) or [("", ())]
        if len(texts) * len(out) > _MOST:
            texts = [max(texts, key=lambda text: len(text[0]))] if len(out) > 1 else texts
        out = [(a + b, holes + more) for a, holes in out for b, more in texts]
    return out
