"""The parts of an HTML page that needs no other file, no script and no network.

All text is escaped here and nowhere else.
"""
import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = '''
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1d2530; --dim: #5d6875;
  --line: #dde2e8; --mark: #33658a; --bar: #33658a2e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --card: #1d232a; --text: #e4e8ec; --dim: #9aa6b2; --line: #333c46;
    --mark: #8bb8da; --bar: #8bb8da38; }
  img.chart { filter: invert(0.885) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.dim { color: var(--dim); font-size: 14px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px; margin-top: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px;
  margin-top: 16px; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 12px; overflow-wrap: anywhere; }
.cards div:first-child { border-color: var(--mark); }
.cards b { display: block; font-size: 20px; line-height: 1.3; }
.cards b.long { font-size: 14px; line-height: 1.86; }
.cards div:has(.long) { grid-column: span 2; }
.cards span { color: var(--dim); font-size: 13px; }
.scroll { overflow-x: auto; }
.tall { max-height: 70vh; overflow-y: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
.wide table { width: 100%; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--dim); font-weight: 600; background: var(--card); position: sticky; top: 0; }
th:first-child, td:first-child, .text td, .text th { text-align: left; padding-left: 2px; }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.text td:first-child { color: var(--dim); white-space: nowrap; padding-right: 18px; }
td.bar { background: linear-gradient(to right, var(--bar) var(--share), transparent 0); }
i.colour { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px;
  border: 1px solid var(--line); vertical-align: -1px; }
img { display: block; max-width: 100%; height: auto; }
img.chart { border-radius: 6px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr));
  gap: 12px; }
.broad img { max-width: none; width: 100%; min-width: 600px; }
.square img { width: 100%; max-width: 700px; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 8px; }
.row figure { margin: 0; }
.row img { width: 100%; border-radius: 5px; }
figcaption { color: var(--dim); font-size: 13px; }
details summary { cursor: pointer; color: var(--mark); }
pre { overflow: auto; max-height: 70vh; font-size: 12.5px; line-height: 1.45; padding: 10px;
  background: var(--page); border-radius: 6px; }
'''


class Raw(str):
    """Text that is HTML already."""


def _text(value: Any) -> str:
    return value if isinstance(value, Raw) else html.escape(str(value))


def page(title: str, subtitle: Sequence[str], parts: Sequence[Raw]) -> str:
    """A whole page of parts.

    It forbids itself to load anything.
    """
    lines = ''.join(f'<p class="dim">{_text(line)}</p>\n' for line in subtitle)
    return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
{lines}{''.join(parts)}</main>
</body>
</html>
'''


def cards(values: Sequence[tuple[str, Any, str]]) -> Raw:
    """The first things to see: of each its name, its value and a remark."""
    return Raw('<div class="cards">\n' + ''.join(
        f'<div><span>{_text(name)}</span><b{long(value)}>{_text(value)}</b>'
        f'<span>{_text(remark)}</span></div>\n' for name, value, remark in values) + '</div>\n')


def long(value: Any) -> str:
    """The attribute of a card's value that is a name rather than a number."""
    return ' class="long"' if len(str(value)) > 11 else ''


def section(title: str, *parts: Raw | str) -> Raw:
    """A part of the page; plain strings are paragraphs."""
    return Raw(f'<section>\n<h2>{_text(title)}</h2>\n' + ''.join(
        part if isinstance(part, Raw) else paragraph(part) for part in parts) + '</section>\n')


def heading(text: str) -> Raw:
    """A heading within a section."""
    return Raw(f'<h3>{_text(text)}</h3>\n')


def paragraph(text: str) -> Raw:
    """A remark."""
    return Raw(f'<p class="dim">{_text(text)}</p>\n')


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, wide: bool = False) -> Raw:
    """A table of figures; a long one scrolls."""
    tall = ' tall' if len(rows) > 30 else ''
    return Raw(f'<div class="scroll{tall}{" wide" if wide else ""}"><table>\n<tr>' +
               ''.join(f'<th>{_text(name)}</th>' for name in header) + '</tr>\n' + ''.join(
                   '<tr>' + ''.join(cell if isinstance(cell, Raw) and cell.startswith('<td')
                                    else f'<td>{_text(cell)}</td>' for cell in row) + '</tr>\n'
                   for row in rows) + '</table></div>\n')


def facts(values: Mapping[str, Any]) -> Raw:
    """A table of names and what they stand for."""
    return Raw('<table class="text">\n' + ''.join(
        f'<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>\n'
        for name, value in values.items()) + '</table>\n')


def share(percent: float, shown: str) -> Raw:
    """A cell of a table whose ground is filled as far as its percentage."""
    filled = 0 if percent != percent else min(max(percent, 0), 100)
    return Raw(f'<td class="bar" style="--share:{filled:.1f}%">{_text(shown)}</td>')


def colour(rgb: Sequence[int], name: str) -> Raw:
    """A name with a patch of its colour."""
    return Raw(f'<i class="colour" style="background:rgb({",".join(map(str, map(int, rgb)))})">'
               f'</i>{_text(name)}')


def chart(png: bytes, says: str) -> Raw:
    """A drawing on white, which becomes one on black where the reader's screen is dark."""
    return Raw(f'<img class="chart" alt="{_text(says)}" src="{_data(png)}">\n')


def side_by_side(parts: Sequence[Raw]) -> Raw:
    """Charts, as many in a row as there is room for."""
    return Raw(f'<div class="charts">\n{"".join(parts)}</div>\n')


def broad(part: Raw) -> Raw:
    """A chart that on a small screen is moved rather than shrunk."""
    return Raw(f'<div class="scroll broad">{part}</div>\n')


def square(part: Raw) -> Raw:
    """A chart that is no wider than a page is high."""
    return Raw(f'<div class="square">{part}</div>\n')


def row(pictures: Mapping[str, bytes]) -> Raw:
    """Pictures side by side, by their captions."""
    return Raw('<div class="row">\n' + ''.join(
        f'<figure><img alt="{_text(name)}" src="{_data(content)}"><figcaption>{_text(name)}'
        '</figcaption></figure>\n' for name, content in pictures.items()) + '</div>\n')


def folded(title: str, text: str) -> Raw:
    """Long text behind its title."""
    return Raw(f'<details><summary>{_text(title)}</summary><pre>{_text(text)}</pre></details>\n')


def _data(content: bytes) -> str:
    kind = 'png' if content.startswith(b'\x89PNG') else 'jpeg'
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
