"""Small expressions over a record's fields, for scores and filters: `judge >= 4 and not truncated`, `0.5 * judge / 5 + 0.5 * correct`.

A field is a dotted path. If its name is not an identifier, it is written `field("6b.is_correct")`, unless it is the entire
expression. `has("judge")` says whether a record has a field, `field("judge", 0)` gives a value for records that lack it; null counts
as lacking. Expressions can use only the operators and functions below, nothing else of Python.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_iwsft.errors import DataError

Evaluate = Callable[[Mapping[str, Any]], Any]

_PATH = re.compile(r"[\w\-]+(\.[\w\-]+)*")
_MAX_BITS = 4096


def _arithmetic(combine: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`combine` for numbers only: a text times a number, or formatted by %, can be of any size."""

    def checked(a: Any, b: Any) -> Any:
        for value in (a, b):
            if not isinstance(value, int | float):
                raise TypeError(f"arithmetic takes numbers, not {type(value).__name__}")
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise OverflowError(f"a number has more than {_MAX_BITS} bits")
        return combine(a, b)

    return checked


def _add(a: Any, b: Any) -> Any:
    """Numbers, or two texts."""
    return a + b if isinstance(a, str) and isinstance(b, str) else _add_numbers(a, b)


_add_numbers = _arithmetic(operator.add)
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: _add,
    ast.Sub: _arithmetic(operator.sub),
    ast.Mult: _arithmetic(operator.mul),
    ast.Div: _arithmetic(operator.truediv),
    ast.FloorDiv: _arithmetic(operator.floordiv),
    ast.Mod: _arithmetic(operator.mod),
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"len": len, "min": min, "max": max, "abs": abs, "float": float, "str": str}
_NAMES = {"true": True, "false": False, "null": None}


class MissingField(KeyError):
    """A record has no field at this path."""


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """The value at dotted `path`; a field whose name itself contains the dots takes precedence. Raises MissingField."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise MissingField(path)
        value = value[part]
    return value


def compile_expression(source: str) -> Evaluate:
    """Compile `source` to a function from a record to the expression's value.

    Raises DataError if `source` is not a valid expression. The function raises MissingField, or whatever the operators raise
    for unsuitable operands (TypeError, ValueError, ZeroDivisionError, OverflowError).
    """
    text = source.strip()
    if _PATH.fullmatch(text) and not _is_number(text) and text not in _NAMES:
        return lambda record: lookup(record, text)
    try:
        return _compile(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(
            f'{source!r} is not a valid expression over fields: {error}. Supported: fields (dotted paths or field("…")), numbers, strings, '
            f'+ - * / // %, comparisons, in, and, or, not, has("…"), field("…", default), {", ".join(_FUNCTIONS)}.'
        ) from None


def _compile(node: ast.expr) -> Evaluate:
    if isinstance(node, ast.Constant):
        value = node.value
        return lambda _: value
    if isinstance(node, ast.Name | ast.Attribute):
        path = ast.unparse(node)
        if path in _NAMES:
            constant = _NAMES[path]
            return lambda _: constant
        if not _PATH.fullmatch(path):
            raise ValueError(f"{path!r} is not a field path")
        return lambda record: lookup(record, path)
    if isinstance(node, ast.List | ast.Tuple):
        items = [_compile(item) for item in node.elts]
        return lambda record: [item(record) for item in items]
    if isinstance(node, ast.BoolOp):
        return _boolean(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        operand, negate = _compile(node.operand), _not if isinstance(node.op, ast.Not) else operator.neg
        return lambda record: negate(operand(record))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        _refuse_texts(node)
        left, right, combine = _compile(node.left), _compile(node.right), _OPERATORS[type(node.op)]
        return lambda record: combine(left(record), right(record))
    if isinstance(node, ast.Compare) and all(type(op) in _OPERATORS for op in node.ops):
        return _comparison(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _call(node, node.func.id)
    raise ValueError(f"{ast.unparse(node)!r} is not allowed")


def truth(value: Any) -> bool:
    """Whether a value is true. Raises TypeError for a text: "false" would be."""
    if isinstance(value, str):
        raise TypeError(
            f'{value!r:.40} is a text, not true or false; compare it, as in field == "yes", or use len(field) > 0'
        )
    return bool(value)


def _not(value: Any) -> bool:
    return not truth(value)


def _refuse_texts(node: ast.BinOp) -> None:
    """Raise ValueError if an operand that is written out is not a number, where only numbers can be combined."""
    for operand in (node.left, node.right):
        odd = isinstance(operand, ast.List | ast.Tuple)
        if isinstance(operand, ast.Constant):
            odd = not isinstance(operand.value, int | float) and not isinstance(node.op, ast.Add)
        if odd:
            raise ValueError(f"{ast.unparse(operand)} is not a number")


def _boolean(node: ast.BoolOp) -> Evaluate:
    values, combine = [_compile(v) for v in node.values], all if isinstance(node.op, ast.And) else any
    return lambda record: combine(truth(value(record)) for value in values)


def _comparison(node: ast.Compare) -> Evaluate:
    values = [_compile(v) for v in (node.left, *node.comparators)]
    operators = [_OPERATORS[type(op)] for op in node.ops]

    def evaluate(record: Mapping[str, Any]) -> bool:
        found = [value(record) for value in values]
        return all(op(a, b) for op, a, b in zip(operators, found, found[1:], strict=False))

    return evaluate


def _call(node: ast.Call, name: str) -> Evaluate:
    if name in ("field", "has"):
        return _field_call(node, name)
    if name not in _FUNCTIONS:
        raise ValueError(f"there is no function {name}")
    function, arguments = _FUNCTIONS[name], [_compile(a) for a in node.args]
    return lambda record: function(*[a(record) for a in arguments])


def _field_call(node: ast.Call, name: str) -> Evaluate:
    """`field("path")`, `field("path", default)` or `has("path")`. With a default, and for `has`, a null is as good as no field."""
    path = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
    if not isinstance(path, str) or len(node.args) > (2 if name == "field" else 1):
        form = 'one quoted path and perhaps a default, as in field("6b.is_correct", 0)'
        raise ValueError(f"{name} takes {form if name == 'field' else 'one quoted path'}")
    if name == "has":
        return lambda record: _lookup_or_none(record, path) is not None
    if len(node.args) == 1:
        return lambda record: lookup(record, path)
    default = _compile(node.args[1])

    def evaluate(record: Mapping[str, Any]) -> Any:
        value = _lookup_or_none(record, path)
        return default(record) if value is None else value

    return evaluate


def _lookup_or_none(record: Mapping[str, Any], path: str) -> Any:
    try:
        return lookup(record, path)
    except MissingField:
        return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
