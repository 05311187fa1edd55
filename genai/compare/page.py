"""The page that compares runs: one HTML file, pictures and curves inside, that names nothing outside itself."""

import base64
import html
import math
from collections.abc import Sequence

from genai.compare.runs import Run, differences, flat, shown, table

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255")


def chart(name: str, runs: Sequence[Run]) -> str:
    """One curve of every run that has it, as SVG; on a logarithmic axis where values span more than a factor of 30."""
    curves = [(k, run.curves[name]) for k, run in enumerate(runs) if name in run.curves]
    points = [(k, [(s, v) for s, v in curve if math.isfinite(v)]) for k, curve in curves]
    values = [v for _, curve in points for _, v in curve]
    if not values:
        return ""
    log = min(values) > 0 and max(values) > 30 * min(values)
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    last, span = max(s for _, curve in points for s, _ in curve) or 1, (high - low) or 1.0

    def at(step: int, value: float) -> str:
        return f"{56 + 300 * step / last:.1f},{150 - 134 * (scale(value) - low) / span:.1f}"

    lines = []
    for k, curve in points:
        title = f"<title>{html.escape(runs[k].name)}: {curve[-1][1]:.4g} at step {curve[-1][0]}</title>"
        path = " ".join(at(s, v) for s, v in curve)
        mark = f'<circle cx="{at(*curve[0]).split(",")[0]}" cy="{at(*curve[0]).split(",")[1]}" r="3" fill="{COLOURS[k % 8]}"/>'
        lines.append(
            f'<g>{title}<polyline points="{path}" stroke="{COLOURS[k % 8]}" fill="none" stroke-width="2"/>'
            f"{mark if len(curve) == 1 else ''}</g>"
        )
    ticks = "".join(
        f'<text x="50" y="{154 - 134 * share:.0f}" text-anchor="end">'
        f"{tick(10 ** (low + share * span) if log else low + share * span)}</text>"
        for share in (0, 0.5, 1)
    )
    foot = f'<text x="56" y="170">0</text><text x="356" y="170" text-anchor="end">{last} steps</text>'
    return (
        f'<figure><figcaption>{html.escape(name)}{" (log)" if log else ""}</figcaption><svg viewBox="0 0 366 176" role="img" '
        f'aria-label="{html.escape(name)}"><path d="M56 16V150H356" class="axis"/>{ticks}{foot}{"".join(lines)}</svg></figure>'
    )


def tick(value: float) -> str:
    """Three digits, and a letter for thousands."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def picture(run: Run, k: int) -> str:
    """The newest grid of a run, or the beginning of its newest texts."""
    if run.grid is not None:
        data = base64.b64encode(run.grid.read_bytes()).decode()
        body = f'<img alt="samples of {html.escape(run.name)}" src="data:image/png;base64,{data}">'
    elif run.texts is not None:
        body = f"<pre>{html.escape(run.texts.read_text(encoding='utf-8')[:1500])}</pre>"
    else:
        body = "<p>no samples</p>"
    return f"<figure><figcaption>{key(k)}{html.escape(run.name)}</figcaption>{body}</figure>"


def key(k: int) -> str:
    return f'<span class="key" style="background:{COLOURS[k % 8]}"></span>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{cells}</table></div>'


def card_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = []
    for k, run in enumerate(runs):
        for metric, card in run.cards.items():
            interval = f"{shown(card.get('low'))} to {shown(card.get('high'))}"
            baselines = ", ".join(f"{name} {shown(value)}" for name, value in card.get("baselines", {}).items()) or "-"
            protocol = ", ".join(f"{name} {value}" for name, value in flat(card["protocol"]).items())
            cells = [metric, shown(card["value"]), interval, shown(card.get("floor")), baselines,
                     shown(card.get("beats_baseline")), shown(card.get("memorised")), protocol]  # fmt: skip
            rows.append([key(k) + html.escape(run.name), *map(html.escape, cells)])
    return rows


STYLE = """
:root { color-scheme: light dark; --text: #1d1d1f; --soft: #6b6b70; --line: #d9d9de; --back: #fff; --raised: #f6f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececf0; --soft: #a2a2aa; --line: #3a3a40; --back: #161618; --raised: #202024 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1280px; padding: 24px 20px 60px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 22px; margin: 0 0 4px } h2 { font-size: 17px; margin: 36px 0 12px } p { color: var(--soft); margin: 0 0 8px }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px }
th, td { text-align: left; padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top }
tr:last-child td { border-bottom: 0 } th { background: var(--raised); font-weight: 600 }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px }
.charts, .grids { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
figure { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--raised); min-width: 0 }
figcaption { font-size: 13px; margin-bottom: 8px; overflow-wrap: anywhere }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 11px }
.axis { stroke: var(--line); fill: none }
img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; margin: 0 }
"""


def report(runs: Sequence[Run]) -> str:
    """One HTML page that names nothing outside itself."""
    rows = table(runs)
    summary = [
        [key(k) + html.escape(row["run"]), *(html.escape(shown(row[c])) for c in row if c != "run")]
        for k, row in enumerate(rows)
    ]
    names = dict.fromkeys(name for run in runs for name, curve in run.curves.items() if len(curve) > 1)
    order = sorted(names, key=lambda n: (n != "val/loss", n != "train/loss", -sum(n in run.curves for run in runs)))
    head = [
        "run",
        "metric",
        "value",
        "interval",
        "real against real",
        "baselines",
        "beats them",
        "memorises",
        "protocol",
    ]
    cards = card_rows(runs)
    changed = [[html.escape(name), *(html.escape(shown(v)) for v in values)] for name, values in differences(runs)]
    parts = [
        f"<h1>{len(runs)} runs</h1><p>{html.escape(', '.join(run.name for run in runs))}</p>",
        "<h2>Summary</h2>" + html_table(list(rows[0]), summary),
        ("<h2>Cards</h2>" + html_table(head, cards)) if cards else "",
        "<h2>Samples</h2><div class='grids'>" + "".join(picture(run, k) for k, run in enumerate(runs)) + "</div>",
        "<h2>Curves</h2><div class='charts'>" + "".join(chart(name, runs) for name in order[:24]) + "</div>",
        ("<h2>What differs in their configs</h2>" + html_table(["key", *(html.escape(run.name) for run in runs)], changed))
        if changed else "",
    ]  # fmt: skip
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{len(runs)} runs compared</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
