"""How a value shows itself in a notebook. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fedfm.core.words import clean

_LONGEST = 400


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """A small table as HTML, a name and a text in each row; everything is escaped, and cut where it is long."""
    lines = [
        f"<tr><th style='text-align:left'>{escape(clean(name))}</th><td style='text-align:left'>{escape(clean(text, _LONGEST))}</td></tr>"
        for name, text in rows
    ]
    return f"<table><caption style='text-align:left'><b>{escape(clean(title))}</b></caption>{''.join(lines)}</table>"


def text(lines: Iterable[str]) -> str:
    """Aligned lines as HTML."""
    return f"<pre>{escape(chr(10).join(map(clean, lines)))}</pre>"


def frame(page: str, height: int = 800) -> str:
    """A whole page inside a notebook's. It runs no script and reaches nothing outside of itself.

    Args:
        height: In pixels.
    """
    return f"<iframe sandbox srcdoc='{escape(page, quote=True)}' style='width:100%;height:{height}px;border:0'></iframe>"
