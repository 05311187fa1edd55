"""The report that compares runs: one HTML file with all pictures and curves inside, and no links to other files.

All content of runs passes through the template page.html, which escapes it: a run may come from somebody else.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from genai.compare.runs import (
    MARKS,
    Run,
    cell,
    columns,
    differences,
    flatten,
    format_value,
    mark,
    same_model_class,
    table,
)
from genai.core.runs import Facts

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255")
CHARTS = 24  # number of charts, of the curves that most runs have
CHARACTERS = 1500  # of a text sample


def chart(name: str, runs: Sequence[Run]) -> Facts | None:
    """Return the data of one chart, a curve for each run, in the coordinates of the page's SVG; None if no value is finite.

    The axis is logarithmic where positive values span more than a factor of 30.
    """
    curves = [(k, run.curves[name]) for k, run in enumerate(runs) if name in run.curves]
    points = [(k, [(s, v) for s, v in curve if math.isfinite(v)]) for k, curve in curves]
    points = [(k, curve) for k, curve in points if curve]
    values = [v for _, curve in points for _, v in curve]
    if not values:
        return None
    log = min(values) > 0 and max(values) > 30 * min(values)
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    last, span = max(s for _, curve in points for s, _ in curve) or 1, (high - low) or 1.0

    def at(step: int, value: float) -> tuple[str, str]:
        return f"{56 + 300 * step / last:.1f}", f"{150 - 134 * (scale(value) - low) / span:.1f}"

    lines = [
        {
            "title": f"{runs[k].label}: {curve[-1][1]:.4g} at step {curve[-1][0]}",
            "points": " ".join(",".join(at(s, v)) for s, v in curve),
            "colour": COLOURS[k % 8],
            "dot": at(*curve[0]) if len(curve) == 1 else None,
        }
        for k, curve in points
    ]
    heights = [(share, low + share * span) for share in (0, 0.5, 1)]
    ticks = [(f"{154 - 134 * share:.0f}", tick(10**y if log else y)) for share, y in heights]
    return {"name": name, "log": log, "last": last, "lines": lines, "ticks": ticks}


def tick(value: float) -> str:
    """Format a number with three digits, and k, M or G for thousands."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def metric_cards(metric: str, runs: Sequence[Run]) -> Facts:
    """Return the data of one metric's chart: runs with their intervals, the floor of real data, and the baselines."""
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

    rows: list[Facts] = []
    for k, run, card in found:
        bar = (at(card["low"]), at(card["high"]) - at(card["low"])) if "low" in card else None
        rows.append(
            {
                "k": k,
                "name": run.label,
                "flag": "memorises its training data" if card.get("memorised") else "",
                "value": format_value(card["value"]) + mark(card.get("beats_baseline")),
                "at": f"{at(card['value']):.1f}",
                "bar": bar and tuple(f"{end:.1f}" for end in bar),
                "colour": COLOURS[k % 8],
                "notes": notes(card),
            }
        )
    for name, value in plain.items():
        rows.append(
            {
                "k": None,
                "name": name,
                "value": format_value(value),
                "at": f"{at(value):.1f}",
                "colour": "var(--soft)",
                "notes": [],
            }
        )
    first, *others = (flatten(card["protocol"]) for _, _, card in found)
    agreed = {name: value for name, value in first.items() if all(o.get(name) == value for o in others)}
    protocol = ", ".join(f"{name} {format_value(value)}" for name, value in agreed.items())
    return {"metric": metric, "better": found[0][2]["better"], "log": log, "rows": rows, "protocol": protocol}


def notes(card: Mapping[str, object]) -> list[str]:
    """Return a card's remarks: why memorisation could not be decided, and why a likelihood is poor."""
    unknown = [f"whether it memorises: {card['memorised_reason']}"] if "memorised_reason" in card else []
    return unknown + ([str(card["why"])] if "why" in card else [])


def read_base64(path: Path) -> str:
    """Read a file as base64, to embed it in the page."""
    return base64.b64encode(path.read_bytes()).decode()


def read_beginning(path: Path) -> str:
    """Read the first CHARACTERS of a text file."""
    return path.read_text(encoding="utf-8", errors="replace")[:CHARACTERS]


def report(runs: Sequence[Run]) -> str:
    """Render the HTML page for runs."""
    from jinja2 import Environment, FileSystemLoader

    rows = table(runs)
    head = columns(rows)
    names = dict.fromkeys(name for run in runs for name, curve in run.curves.items() if len(curve) > 1)
    first = "card/", "val/loss", "train/loss"
    order = sorted(names, key=lambda n: ([not n.startswith(f) for f in first], -sum(n in run.curves for run in runs)))
    charts = [found for name in order[:CHARTS] if (found := chart(name, runs)) is not None]
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return page.get_template("page.html").render(
        runs=runs,
        head=head,
        summary=[[cell(row, name) for name in head] for row in rows],
        marks=MARKS,
        colours=COLOURS,
        cards=[metric_cards(name, runs) for name in dict.fromkeys(name for run in runs for name in run.cards)],
        charts=charts,
        changed=[[name, *map(format_value, values)] for name, values in differences(runs)],
        same_model_class=same_model_class(runs),
        read_base64=read_base64,
        read_beginning=read_beginning,
    )
