"""The page that compares runs: one HTML file, pictures and curves inside, that names nothing outside itself."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

from genai.compare.runs import MARKS, Run, alike, cell, columns, differences, flat, mark, shown, table

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
        title = f"<title>{html.escape(runs[k].label)}: {curve[-1][1]:.4g} at step {curve[-1][0]}</title>"
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
    """The newest grid of a run, or the beginning of its newest texts, and its samples that lie nearest to training images."""
    body = "<p>no samples</p>"
    if run.grid is not None:
        body = embedded(run.grid, f"samples of {run.label}")
    elif run.texts is not None:
        body = f"<pre>{html.escape(run.texts.read_text(encoding='utf-8')[:1500])}</pre>"
    if run.nearest is not None:
        body += "<p class='told'>samples nearest to training images, and those below them</p>"
        body += embedded(run.nearest, f"nearest pairs of {run.label}")
    return f"<figure><figcaption>{key(k)}{html.escape(run.label)}</figcaption>{body}</figure>"


def embedded(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def key(k: int) -> str:
    return f'<span class="key" style="background:{COLOURS[k % 8]}"></span>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{cells}</table></div>'


def metric_cards(metric: str, runs: Sequence[Run]) -> str:
    """The cards of one metric on one scale: runs with their intervals, what real data score, and the baselines."""
    found = [(k, run, run.cards[metric]) for k, run in enumerate(runs) if metric in run.cards]
    floor = found[0][2].get("floor")
    plain = {} if floor is None else {"real data": floor}
    plain |= {what: value for _, _, card in found for what, value in card.get("baselines", {}).items()}
    ends = [card.get(end, card["value"]) for _, _, card in found for end in ("low", "high")] + [*plain.values()]
    low, high = min(ends), max(ends)
    log = low > 0 and high > 30 * low
    scale = math.log if log else float

    def at(value: float) -> float:
        return 100 * (scale(value) - scale(low)) / ((scale(high) - scale(low)) or 1.0)

    def row(name: str, value: float, ends: tuple[float, float] | None, colour: str, note: str = "") -> str:
        bar = (
            ""
            if ends is None
            else f'<i class="bar" style="left:{at(ends[0]):.1f}%;width:{at(ends[1]) - at(ends[0]):.1f}%;background:{colour}"></i>'
        )
        return (
            f'<div class="row"><span>{name}</span><span class="value">{shown(value)}{note}</span></div>'
            f'<div class="track">{bar}<i class="dot" style="left:{at(value):.1f}%;background:{colour}"></i></div>'
        )

    rows = []
    for k, run, card in found:
        flag = ' <em class="flag">memorises its training data</em>' if card.get("memorised") else ""
        ends = (card["low"], card["high"]) if "low" in card else None
        name = key(k) + html.escape(run.label) + flag
        rows.append(row(name, card["value"], ends, COLOURS[k % 8], mark(card.get("beats_baseline"))))
    rows += [row(f"<em>{html.escape(name)}</em>", value, None, "var(--soft)") for name, value in plain.items()]
    first, *others = (flat(card["protocol"]) for _, _, card in found)
    told = ", ".join(
        f"{name} {shown(value)}" for name, value in first.items() if all(o.get(name) == value for o in others)
    )
    better = found[0][2]["better"]
    return (
        f"<figure><figcaption>{html.escape(metric)}, {better} is better{' (log)' if log else ''}</figcaption>{''.join(rows)}"
        f"<p class='told'>{html.escape(told)}</p></figure>"
    )


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
.charts, .grids { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
figure { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--raised); min-width: 0 }
figcaption { font-size: 13px; margin-bottom: 8px; overflow-wrap: anywhere }
.row em { color: var(--soft); font-style: normal }
.row { display: flex; justify-content: space-between; gap: 12px; font-size: 13px; margin-top: 9px; overflow-wrap: anywhere }
.value { font-variant-numeric: tabular-nums; white-space: nowrap }
.track { position: relative; height: 10px; margin: 2px 6px 0 } .track::before { content: ""; position: absolute; left: -6px;
  right: -6px; top: 5px; border-top: 1px solid var(--line) }
.bar, .dot { position: absolute } .bar { top: 4px; height: 3px; opacity: .55 }
.dot { width: 9px; height: 9px; margin: 1px 0 0 -4.5px; border-radius: 50% }
.told { font-size: 12px; margin: 10px 0 0 } .row .flag { color: #d55e00 }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 11px }
.axis { stroke: var(--line); fill: none }
img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; margin: 0 }
"""


def report(runs: Sequence[Run]) -> str:
    """One HTML page that names nothing outside itself."""
    rows = table(runs)
    head = columns(rows)
    summary = [
        [key(k) + html.escape(row["run"]), *(html.escape(cell(row, c)) for c in head[1:])] for k, row in enumerate(rows)
    ]
    names = dict.fromkeys(name for run in runs for name, curve in run.curves.items() if len(curve) > 1)
    first = "card/", "val/loss", "train/loss"
    order = sorted(names, key=lambda n: ([not n.startswith(f) for f in first], -sum(n in run.curves for run in runs)))
    metrics = dict.fromkeys(name for run in runs for name in run.cards)
    changed = [[html.escape(name), *(html.escape(shown(v)) for v in values)] for name, values in differences(runs)]
    parts = [
        f"<h1>{len(runs)} runs</h1><p>{html.escape(', '.join(run.name for run in runs))}</p>",
        "<h2>Summary</h2>" + html_table([html.escape(c) for c in head], summary),
        f"<h2>Cards</h2><p>{MARKS}; a bar from the least to the greatest of several sets of samples, or an interval of 95 %.</p>"
        "<div class='charts'>" + "".join(metric_cards(name, runs) for name in metrics) + "</div>" if metrics else "",
        "<h2>Samples</h2><div class='grids'>" + "".join(picture(run, k) for k, run in enumerate(runs)) + "</div>",
        "<h2>Curves</h2>" + ("" if alike(runs) else "<p>Losses of different models do not compare.</p>")
        + "<div class='charts'>" + "".join(chart(name, runs) for name in order[:24]) + "</div>",
        "<h2>What differs in their configs</h2>" + html_table(["key", *(html.escape(run.label) for run in runs)], changed)
        if changed else "",
    ]  # fmt: skip
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{len(runs)} runs compared</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
