"""Formulas of the documentation: LaTeX in a ```math block becomes MathML, which browsers show without a script or a network."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def block(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **_: Any) -> str:
    """A `custom_fences` formatter of pymdownx.superfences."""
    return f'<div class="{css_class}">{convert(source.strip(), display="block")}</div>'
