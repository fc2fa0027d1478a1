"""A report as one HTML page: figures inside it, no script, nothing fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdllm_ext.eval.sections import problems_said

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
table { display: block; overflow-x: auto; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.front td { font-weight: 600; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
p.note, figcaption, dt { color: var(--soft); } figure { margin: 1rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dl { font-size: 13px; } dd { margin: 0; }
"""


def render(facts: dict[str, Any], folder: Path) -> str:
    """The page of a report's facts. ``folder`` holds the figures that they name."""
    c = facts["conditions"]
    title = f"What speed costs: {c['model_name']} on {c['task']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=note>{html.escape(facts['date'])} · {html.escape(c['machine'])} · "
        f"{problems_said(facts)}, {html.escape(c['metric'])}</p>",
    ]
    for section in facts["sections"]:
        parts.append(f"<h2>{html.escape(section['title'])}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.get("text", ())]
        for name in section.get("figures", ()):
            data = base64.b64encode((folder / name).read_bytes()).decode()
            alt = html.escape(section["title"], quote=True)
            parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>')
        if section.get("table"):
            parts.append(_table(**section["table"]))
    shown = {name: value for name, value in c.items() if name != "environment"} | {
        "command": facts["command"]
    }
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in (shown | c["environment"]).items()
    )
    parts.append(f"<h2>Conditions</h2><dl>{rows}</dl>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int] = ()) -> str:
    lines = [
        "<table><thead><tr>" + "".join(f"<th>{html.escape(x)}</th>" for x in head) + "</tr></thead><tbody>"
    ]
    for i, row in enumerate(rows):
        kind = ' class="front"' if i in marked else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>")
    return "".join(lines) + "</tbody></table>"
