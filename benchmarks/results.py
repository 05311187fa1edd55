"""Writes the pages and tables of results from the JSON records in benchmarks/results.

    python -m benchmarks.results             write docs/results.md, and the marked tables of README.md and docs/*.md
    python -m benchmarks.results --check     exit with code 2 and a sentence if one of them differs from its record

A marked table stands between `<!-- results: begin NAME -->` and `<!-- results: end -->`; without a name it is `models`.
"""

import argparse
import ast
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

RESULTS, ROOT = Path(__file__).parent / "results", Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- results: begin ?(\w*) -->\n).*?(<!-- results: end -->)", re.DOTALL)
REPAIR = "run python -m benchmarks.results"
NEEDED = "command", "commit", "date", "hardware"

# figure of a recipe: the words before it in a sentence, its format, the words after it, and the name of its row in a table
FIGURES = {
    "accuracy": ("class recognised ", ".1%", "", "share of samples whose class is recognised"),
    "frechet": ("Fréchet distance ", ".1f", "", "Fréchet distance"),
    "precision": ("precision ", ".2f", "", "precision"),
    "recall": ("recall ", ".2f", "", "recall"),
    "bits_per_dim": ("", ".3f", " bits/dim", "bits per dimension"),
    "bits_per_dim, probability_flow": (
        "",
        ".3f",
        " bits/dim by its ODE",
        "bits per dimension by the probability flow ODE",
    ),
    "nats": ("", ".2f", " nats", "negative log-likelihood in nats"),
    "elbo": ("ELBO ", ".2f", "", "evidence lower bound in nats"),
    "val/loss": ("", ".3f", " nats/token", "validation loss in nats per token"),
    "nats_per_token": ("", ".3f", " nats/token", "nats per token"),
    "token_error_rate": ("", ".2%", " of tokens wrong", "share of tokens that are wrong"),
    "token_error_rate, beams=1": ("", ".2%", " greedily", "share of tokens that are wrong, without a beam"),
    "exact_match, beams=1": ("", ".1%", " greedily", "share of answers that are right, without a beam"),
    "masked_nats": ("", ".3f", " masked nats", "nats of a hidden token"),
    "masked_accuracy": ("masked accuracy ", ".1%", "", "share of hidden tokens that are guessed"),
    "exact_match": ("exact ", ".1%", "", "share of answers that are right"),
    "pseudo_perplexity": ("pseudo-perplexity ", ".2f", "", "pseudo-perplexity"),
    "reconstruction_psnr_db": ("", ".1f", " dB", "peak signal-to-noise ratio of reconstructions in dB"),
    "code_perplexity": ("perplexity of codes ", ".1f", "", "perplexity of codes"),
    "bits_per_sample": ("", ".3f", " bits/sample", "bits per sample of a waveform"),
    "nats_per_step": ("", ".3f", " nats/step", "nats per step, of all voices together"),
    "pitch_range": ("range ", ".1f", " semitones", "range of pitches in semitones"),
    "repetition": ("repetition ", ".3f", "", "share of four successive notes that came before in a melody"),
    "out_of_key": ("out of key ", ".3f", "", "share of steps outside of the best major scale"),
    "melody_copy": ("copies ", ".1f", " notes", "successive notes that the training split has too"),
    "bits_per_image": ("", ".0f", " bits an image", "bits an image"),
}
HEADLINES = {  # which of them README shows
    "images": ("bits_per_dim", "nats", "accuracy", "frechet", "recall"),
    "latents": ("reconstruction_psnr_db", "code_perplexity", "accuracy", "recall"),
    "text": ("val/loss", "nats_per_token", "masked_nats", "masked_accuracy", "token_error_rate", "exact_match"),
    "gans": ("accuracy", "frechet", "recall"),
    "audio": ("bits_per_sample", "accuracy", "frechet", "recall"),
    "music": ("nats_per_step",),
}
SECTIONS = {
    "images": "Images",
    "text": "Text",
    "latents": "Latents",
    "gans": "GANs",
    "audio": "Audio",
    "music": "Melodies",
}
# benchmarks of each section, in their order
BENCHMARKS = {
    "latents": ["guidance_latent_mnist_text", "guidance_dalle_mnist", "completion", "latent", "media"],
    "Evaluation": ["baselines", "quality", "solvers", "evaluate"],
    "Speed on a CPU": [
        "gpt_train",
        "gpt_generate",
        "wavenet",
        "unet",
        "vae",
        "gan",
        "loop",
        "sample",
        "sample_network",
        "folder",
        "step",
    ],
}
INTRODUCTION = """# Results

<!-- written by python -m benchmarks.results: edit the records in benchmarks/results, not this page -->

Every figure on this page was measured, and is read from a record in `benchmarks/results`: JSON with the command, the commit, the
date and the hardware. `python -m benchmarks.results` writes this page and the tables of results in README and the other pages; a
test fails if a figure differs from its record. The commit of a record is the code that was measured; in older records it is the
commit that brought the figure into the repository.

To measure again, run the command of a record. `python -m benchmarks.recipes <name>` trains and evaluates a recipe;
the other benchmarks are listed with their commands below. `pip install -e ".[bench]"` installs the packages they are compared
with. Each writes its record; then run `python -m benchmarks.results`.

- **Class recognised** is the share of samples in which a classifier, trained on the real data, recognises the requested class.
- **Fréchet distance, precision and recall** compare samples with test images in the features of that classifier; do not compare
  them with figures in Inception features. They are means over 5 sets of as many samples as there are test images, unless the
  command has `n=` and `repeats=`; brackets have the least and the greatest. The column *real data* has the figure of other real
  images, or of real melodies.
- **Bits per dimension and nats** are negative log-likelihoods of the test split, or upper bounds on them, with the standard error
  over its items.
- Times of training are wall-clock times, or CPU time where the record says so. Speeds are medians; brackets have the least and
  the greatest round.
"""


def load(name: str) -> Any:
    """The content of results/<name>.json. Exits with code 2 and a sentence if it cannot be read, or holds no keys."""
    global loaded
    loaded, content = f"{name}.json", None
    try:
        content = json.loads((RESULTS / loaded).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse(loaded, f"cannot be read ({error})")
    if not isinstance(content, dict) or not content:
        refuse(loaded, "holds no keys")
    return content


loaded = ""  # name of the file that was loaded last


def refuse(where: str, why: str) -> NoReturn:
    """Print a sentence about a record and exit with code 2."""
    print(f"benchmarks/results/{where} {why}: measure it again, or restore it with git checkout", file=sys.stderr)
    raise SystemExit(2)


def check_records() -> None:
    """Exit with code 2 and a sentence if a record does not say where its figures come from."""
    for where, record in records():
        for key in NEEDED:
            if not record.get(key):
                refuse(where, f"has no {key}")


def records() -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) for all records: of benchmarks, of each part of a GPU's file, and of each run of a recipe."""
    for path in sorted(RESULTS.glob("*.json")):
        content = load(path.stem)
        if path.stem == "recipes":
            for name, entry in content.items():
                for run in entry["runs"]:
                    yield f"{path.name}, {name}, seed {run['seed']}", {"command": entry["commands"][0], **run}
        elif "parts" in content:
            for name, part in content["parts"].items():
                hardware = part.get("figures", {}).get("hardware", {"gpu": content["card"]})
                yield f"{path.name}, {name}", {"hardware": hardware, **part}
        else:
            yield path.name, content


def cell(value: Any) -> str:
    """A value as a table shows it: floats with three significant digits, lists of errors without their leading zeros."""
    if isinstance(value, list):
        return " ".join(f"{v:.3f}".removeprefix("0") if isinstance(v, float) else str(v) for v in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    if isinstance(value, Mapping):  # where a row kept from an earlier run was measured
        return place(value)
    return str(value) if value is not None else ""


def column(values: Sequence[Any]) -> list[str]:
    """The values of a column as a table shows them; all numbers have as many decimals if one of them is a float.

    The smallest number decides: it gets three digits, or two below 1. Shares get three decimals. None has more than the record.
    """
    numbers = [v for v in values if isinstance(v, int | float)]
    if not any(isinstance(v, float) for v in numbers):
        return [cell(v) for v in values]
    smallest, largest = min((abs(v) for v in numbers if v), default=1), max(map(abs, numbers))
    power = math.floor(math.log10(smallest))
    decimals = max(0, 2 - power) if power >= 0 else 1 - power
    if largest <= 1:
        decimals = max(3, decimals)
    recorded = max(-int(Decimal(repr(float(v))).as_tuple().exponent) for v in numbers)
    return [f"{v:,.{min(decimals, recorded)}f}" if isinstance(v, int | float) else cell(v) for v in values]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table with the columns of all of them, `measured` last."""
    columns = sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name == "measured")
    shown = [column([row.get(name) for row in rows]) for name in columns]
    lines = [columns, ["---"] * len(columns), *zip(*shown, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def place(record: Mapping[str, Any]) -> str:
    """Date, commit and hardware of a record."""
    hardware, commit = record["hardware"], record["commit"][:7]
    machine = [hardware[key] for key in ("gpu", "cpu") if key in hardware]
    machine += [f"torch {hardware['torch']}"] if "torch" in hardware else []
    machine += [hardware["clock"]] if "clock" in hardware else []
    changed = " with uncommitted changes" if record.get("uncommitted") else ""
    return f"{record['date']}, commit `{commit}`{changed}, {', '.join(machine)}"


def recipes() -> dict[str, dict[str, Any]]:
    """The entries of recipes.json; an entry with `figures_of` gets the figures of that record's row."""
    global loaded
    found = load("recipes")
    for entry in found.values():
        if source := entry.get("figures_of"):
            ((at, value),) = source["row"].items()
            (row,) = [row for row in load(source["record"])["rows"] if row[at] == value]
            figures = {name: {"value": figure} for name, figure in row.items() if name in FIGURES}
            entry["runs"][0]["figures"] = figures | entry["runs"][0]["figures"]
    loaded = "recipes.json"  # what its callers read
    return found


def duration(seconds: float) -> str:
    """Seconds below three minutes, then minutes."""
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"


def sentence(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    """These figures of a recipe's first run, with those of its other runs in brackets."""
    parts = []
    for name in names:
        before, form, after, _ = FIGURES[name]
        values = [format(run["figures"][name]["value"], form) for run in entry["runs"] if name in run["figures"]]
        if values:
            others = f" ({', '.join(values[1:])})" if values[1:] else ""
            parts.append(f"{before}{values[0]}{others}{after}")
    return ", ".join(parts)


def train_command(entry: Mapping[str, Any]) -> str:
    """A recipe's first command without seed and run directory."""
    return entry["commands"][0].replace(" seed={seed}", "").replace(" run_dir={run}", "")


def models() -> str:
    """The recipes that README shows: command, figures and time, and a paragraph that explains them."""
    rows = []
    for entry in recipes().values():
        if entry.get("readme", True):
            command = re.sub(r" codec\.ckpt=\S+", "", train_command(entry))
            rows.append(
                {
                    "model": entry["model"],
                    "command": f"`{command}`",
                    "result": sentence(entry, HEADLINES[entry["section"]]),
                    "time": duration(entry["runs"][0]["figures"]["seconds"]["value"]),
                }
            )
    digits, mnist = (real_images(name) for name in ("ddpm_digits", "dcgan_mnist"))
    latents = format(load("guidance_latent_mnist_text_cpu")["recall_of_real_images"], FIGURES["recall"][1])
    return (
        f"{table(rows)}\nFigures in parentheses are of the same command run again: where there are two, with seeds 1 and 2. "
        "Fréchet distance and recall are of 360 samples for digits, where as many other real images have a distance of "
        f"{digits['frechet']} and a recall of {digits['recall']}, and of 1,000 samples for MNIST, where real images have "
        f"{mnist['frechet']} and {mnist['recall']} ({latents} in the rows of latent diffusion and DALL-E). A token of tiny "
        "Shakespeare is one character.\n"
    )


def real_images(name: str) -> dict[str, str]:
    """Return the figures of real images that the first run of a recipe was compared with, by name."""
    figures = recipes()[name]["runs"][0]["figures"]
    return {key: format(of["reference"], FIGURES[key][1]) for key, of in figures.items() if "reference" in of}


def cards() -> str:
    """Four families on digits: Fréchet distance with its range, precision, recall and likelihood."""
    rows = []
    for name in ("ddpm_digits", "gan_digits", "vae_digits", "gpt_digits"):
        entry = recipes()[name]
        figures = entry["runs"][0]["figures"]
        row = {"run": f"`{train_command(entry)}`"}
        row |= {FIGURES[key][3]: measured(key, figures[key]) for key in ("frechet", "precision", "recall")}
        rows.append(
            row | {"bits/dim": measured("bits_per_dim", figures["bits_per_dim"]) if "bits_per_dim" in figures else ""}
        )
    return table(rows)


def likelihoods() -> str:
    """Bits per dimension of digits: a baseline and three families."""
    mixtures = [
        row for row in load("baselines_cpu")["rows"] if row["baseline"].startswith("mixture of 10 multinomials")
    ]
    rows = [
        {"model": row["baseline"], "bits/dim": row["bits/dim"].split()[0], "kind": "exact; mean of fits"}
        for row in mixtures
    ]
    for name in ("vae_digits", "gpt_digits", "ddpm_digits_nll"):
        entry = recipes()[name]
        figures = entry["runs"][-1]["figures"]
        rows += [
            {
                "model": f"`{train_command(entry)}`" + (", by `likelihood=probability_flow`" if "," in key else ""),
                "bits/dim": f"{figures[key]['value']:.3f}",
                "kind": figures[key].get("bound", "the density of the ODE"),
            }
            for key in ("bits_per_dim", "bits_per_dim, probability_flow")
            if key in figures
        ]
    return table(rows)


def text_likelihoods() -> str:
    """Nats per character of tiny Shakespeare's validation split: n-grams, a GPT, and the bound of masked diffusion."""
    rows = [
        {"model": row["baseline"], "nats/character": row["nats/token"], "kind": "exact"}
        for row in load("baselines_cpu")["rows"]
        if row["data"] == "tiny Shakespeare" and row["baseline"] in ("interpolated 1-gram", "interpolated 5-gram")
    ]
    found = recipes()
    for name, key in (("gpt_shakespeare_cpu", "val/loss"), ("mdlm_shakespeare", "nats_per_token")):
        figures = found[name]["runs"][0]["figures"]
        row = {"model": f"`{train_command(found[name])}`", "nats/character": f"{figures[key]['value']:.3f}"}
        rows.append(row | {"kind": figures[key].get("bound", "exact"), "time": duration(figures["seconds"]["value"])})
    return table(rows)


def measured(name: str, figure: Mapping[str, Any]) -> str:
    """A figure with its standard error or its range."""
    form = FIGURES[name][1]
    value = (
        format(figure["value"], form) if float(format(figure["value"], form.rstrip("%"))) else f"{figure['value']:.1g}"
    )
    if "standard_error" in figure:
        return f"{value} ± {figure['standard_error']:{form}}"
    return f"{value} [{figure['low']:{form}}, {figure['high']:{form}}]" if "low" in figure else value


def figure_row(name: str, figure: Mapping[str, Any]) -> dict[str, Any]:
    """A figure's row in the table of its recipe."""
    if name == "seconds":
        return {"figure": "time of training", "value": duration(figure["value"])}
    if name == "memorised":
        return {"figure": "copies of training images", "value": "some" if figure["value"] else "none"}
    row = {"figure": FIGURES[name][3], "value": measured(name, figure)}
    if "reference" in figure:
        row["real data"] = format(figure["reference"], FIGURES[name][1])
    return row | ({"kind": figure["bound"]} if "bound" in figure else {})


def recipe(name: str, entry: Mapping[str, Any]) -> str:
    """A recipe's part of the page: its commands, its figures for each seed, and where and when they were measured."""
    commands = "\n".join(c.format(seed=entry["runs"][0]["seed"], run=f"runs/{name}") for c in entry["commands"])
    rows, places = [], {}
    for run in entry["runs"]:
        for key, figure in run["figures"].items():
            number = places.setdefault(place({**run, **figure}), len(places) + 1)
            rows.append({"seed": run["seed"], **figure_row(key, figure), "measured": number})
    lines = "".join(f"{number}. {source}\n" for source, number in places.items())
    note = f"{entry['note']}\n\n" if "note" in entry else ""
    return f"### {entry['model']}\n\n```bash\n{commands}\n```\n\n{note}{table(rows)}\nMeasured:\n\n{lines}"


def description(module: str) -> tuple[str, str]:
    """(title, paragraphs) of a benchmark, from its docstring without the commands."""
    text = ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{module}.py").read_text())) or ""
    title, *rest = text.split("\n\n")
    return title.rstrip("."), "\n\n".join(part for part in rest if not part.startswith("    "))


def benchmark(record: Mapping[str, Any], described: bool = True) -> str:
    """A benchmark's part of the page: what it measures, its command, its table, and where and when it was measured."""
    name = record["benchmark"]
    module = re.search(r"benchmarks\.(\w+)", record["command"])[1]  # type: ignore[index]
    title, text = description(module)
    if name == "sample_network":
        title, text = "Images a second of sampling with a U-Net", "With `--network`, as described above." * described
    elif name != module:
        title = f"{title}: {name.removeprefix(module + '_')}"
        described &= name == next(n for names in BENCHMARKS.values() for n in names if n.startswith(f"{module}_"))
    used = {*NEEDED, "uncommitted", "benchmark", "rows", "sampler", "left_out"}
    facts = [f"{key.replace('_', ' ')} {cell(value)}" for key, value in record.items() if key not in used]
    facts += [f"not measured in this run: {', '.join(record['left_out'])}"] if "left_out" in record else []
    about = "; ".join([place(record), *facts])
    parts = [f"### {title}", *([text] if described and text else []), f"```bash\n{record['command']}\n```"]
    return "\n\n".join([*parts, table(record["rows"]) + f"\nMeasured {about}.\n"])


def gpu(name: str) -> str:
    """The section of one GPU's file; a part that failed is shown with its last line."""
    content = load(name)
    parts = [f"## Speed on a GPU: {content['card']}\n\nThe same benchmarks, described above, by `benchmarks/gpu.sh`.\n"]
    for part, entry in content["parts"].items():
        if "rows" in entry.get("figures", {}):
            about = {key: entry[key] for key in ("command", "commit", "date")}
            parts.append(benchmark({**entry["figures"], **about}, described=False))
        else:
            result = entry["error"][-1] if "error" in entry else entry["figures"]["summary"]
            where = f"{entry['date']}, commit `{entry['commit'][:7]}`"
            title = "Tests that need a GPU" if part == "tests" else part
            parts.append(
                f"### {title}\n\n```bash\n{entry['command']}\n```\n\nMeasured {where}: {result.strip('= ')}.\n"
            )
    return "\n".join(parts)


def page() -> str:
    """The whole of docs/results.md."""
    parts = [INTRODUCTION, "## Models\n", models()]
    for section, title in SECTIONS.items():
        parts += [
            f"## {title}\n",
            *(recipe(n, entry) for n, entry in recipes().items() if entry["section"] == section),
        ]
        parts += [benchmark(load(f"{name}_cpu")) for name in BENCHMARKS.get(section, [])]
    for title in [title for title in BENCHMARKS if title not in SECTIONS]:
        extra = ["### Families of models on digits\n", cards(), "### Likelihoods of digits\n", likelihoods()]
        parts += [f"## {title}\n", *(extra if title == "Evaluation" else [])]
        parts += [benchmark(load(f"{name}_cpu")) for name in BENCHMARKS[title]]
    parts += [gpu(path.stem) for path in sorted(RESULTS.glob("gpu_*.json"))]
    return "\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {"models": models, "cards": cards, "likelihoods": likelihoods}
TABLES["text_likelihoods"] = text_likelihoods
TABLES |= {name: lambda name=name: table(load(f"{name}_cpu")["rows"]) for part in BENCHMARKS.values() for name in part}


def with_tables(text: str, path: str) -> str:
    """A page's text with all its marked tables made from their records. Raises SystemExit for a name without a table."""

    def fill(match: re.Match) -> str:
        name = match[2] or "models"
        if name not in TABLES:
            raise SystemExit(f"{path}: the marked table {name!r} must be one of {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[name]()}\n{match[3]}"

    return MARKED.sub(fill, text)


def pages() -> dict[Path, str]:
    """All pages that have results, as they should be."""
    found = {ROOT / "docs" / "results.md": page()}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if path not in found:
            found[path] = with_tables(path.read_text(), path.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 2 if a page differs")
    args = parser.parse_args()
    try:
        check_records()
        written = pages()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"has no {error.args[0]}" if isinstance(error, KeyError) else "is not a record"
        refuse(loaded, why)
    for path, text in written.items():
        if path.exists() and path.read_text() == text:
            continue
        if args.check:
            print(f"{path.relative_to(ROOT)} differs from the records in benchmarks/results: {REPAIR}", file=sys.stderr)
            raise SystemExit(2)
        path.write_text(text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
