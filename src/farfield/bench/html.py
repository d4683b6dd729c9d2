"""Pieces of an HTML page that is one file and fetches nothing: its style, figures, tables, definitions.

Example:
    >>> definitions([("torch", "2.13.0")])
    '<dl><dt>torch</dt><dd>2.13.0</dd></dl>'
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

__all__ = ["definitions", "document", "figure", "image", "table", "text"]

_CSS = """
:root { --ink: #22262b; --muted: #5d6673; --line: #e2e5ea; --paper: #fff; --ground: #f6f7f9; --accent: #0072b2 }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px }
h2 { font-size: 20px; margin: 44px 0 6px }
p { margin: 6px 0 10px; max-width: 88ch }
.sub, figcaption, .note { color: var(--muted) }
figcaption, .note { font-size: 14px; max-width: 110ch }
.answer { background: var(--paper); border: 1px solid var(--line); border-left: 6px solid var(--accent);
  border-radius: 8px; padding: 18px 22px; margin: 24px 0 14px }
.answer strong { display: block; font-size: 20px; line-height: 1.35; margin-bottom: 8px; font-weight: 650 }
.answer ul { margin: 0; padding-left: 20px }
.warn { background: #fff7e6; border: 1px solid #f0d9a8; border-radius: 8px; padding: 10px 18px; margin: 10px 0;
  font-size: 15px }
figure { margin: 10px 0 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 16px }
figure svg, figure img { display: block; width: 100%; height: auto }
figcaption { margin-top: 10px }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  margin-top: 10px }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums }
th, td { padding: 8px 14px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--muted); font-size: 13px; border-top: 0 }
th:first-child, td:first-child { text-align: left }
tr.best td { font-weight: 650 }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 8px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 10px 0; font-size: 15px }
dt { color: var(--muted) }
dd { margin: 0; overflow-wrap: anywhere }
pre { background: #22262b; color: #f3f4f6; border-radius: 8px; padding: 14px 18px; font-size: 14px;
  white-space: pre-wrap; overflow-wrap: anywhere }
""".strip()


def text(value: object) -> str:
    """Anything as text of a page."""
    return html.escape(str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def figure(picture: str, caption: str) -> str:
    """A picture (an element of its own) over its caption."""
    return f"<figure>{picture}<figcaption>{text(caption)}</figcaption></figure>"


def image(data: bytes, alternative: str) -> str:
    """PNG data as an element, with what to read instead."""
    return f'<img alt="{text(alternative)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], dots: Sequence[str], best: bool) -> str:
    """A table whose rows begin with a coloured dot; with ``best`` the first row stands out."""
    head = "".join(f"<th>{text(h)}</th>" for h in headings)
    lines = []
    for n, (row, dot) in enumerate(zip(rows, dots, strict=True)):
        first = f'<td><span class="dot" style="background:{dot}"></span>{text(row[0])}</td>'
        kind = ' class="best"' if best and n == 0 else ""
        lines.append(f"<tr{kind}>{first}{''.join(f'<td>{text(cell)}</td>' for cell in row[1:])}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def definitions(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values side by side."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in pairs)}</dl>"


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """The whole page, with further style for what it alone has."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_CSS}{style}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )
