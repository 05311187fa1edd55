"""Runs side by side: what is read, what is not ranked, a page that needs nothing else."""

import base64
import csv
import io as stdlib_io
import json
import re
import shutil
import subprocess

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from genai.compare.page import chart, report
from genai.compare.runs import Run, check_protocols, differences, rank_runs, read, read_all, table
from genai.core.errors import UserError
from genai.modalities.base import to_pil
from tests.conftest import python

PROTOCOL = {
    "n": 1000,
    "split": "test",
    "shape": [1, 8, 8],
    "data_checksum": "1111",
    "extractor": {"name": "classifier", "sha256": "abc"},
}


def write(folder, target="genai.models.gan.gan.GAN", value=0.5, lr=1e-3, protocol=PROTOCOL, texts=None, **config):
    """A run directory as train.py and an evaluation leave it."""
    (folder / "samples").mkdir(parents=True)
    (folder / "cards").mkdir()
    stored = {
        "model": {"_target_": target},
        "data": {"_target_": "genai.data.images.Digits"},
        "optim": {"lr": lr},
        **config,
    }
    OmegaConf.save(OmegaConf.create(stored), folder / "config.yaml")
    rows = [
        f"{step},train/loss,{1 / (step + 1)}\n{step},val/loss,{value + 1 / (step + 1)}\n" for step in range(0, 50, 10)
    ]
    (folder / "metrics.csv").write_text("step,name,value\n" + "".join(rows) + "50,odd/nan,nan\n")
    if texts is None:
        to_pil(torch.randint(0, 255, (1, 20, 30), dtype=torch.uint8)).save(folder / "samples" / "samples_0000040.png")
        to_pil(torch.zeros(1, 4, 4, dtype=torch.uint8)).save(folder / "samples" / "samples_0000010.png")
    else:
        (folder / "samples" / "samples_0000040.txt").write_text(texts)
    card = {
        "metric": "frechet",
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "better": "lower",
        "protocol": protocol,
        "floor": 0.2,
        "baselines": {"gmm": 0.7},
        "beats_baseline": value < 0.7,
        "memorised": False,
    }
    (folder / "cards" / "frechet.json").write_text(json.dumps(card))
    if texts is None:
        to_pil(torch.zeros(1, 8, 8, dtype=torch.uint8)).save(folder / "cards" / "nearest.png")
    return folder


@pytest.fixture
def four(tmp_path):
    """Runs of four families."""
    return [
        write(tmp_path / "gan", value=0.9),
        write(tmp_path / "ddpm", "genai.models.diffusion.ddpm.DDPM", 0.3, schedule={"steps": 200}),
        write(tmp_path / "vae", "genai.models.vae.vae.VAE", 2.0, lr=2e-3),
        write(tmp_path / "gpt", "genai.models.autoregressive.gpt.GPT", 0.6, texts="<b>& once upon a time"),
    ]


def test_a_run_is_read_as_it_was_written(four):
    run = read(four[0])
    assert run.curves["train/loss"][0] == (0, 1.0) and run.last("val/loss") == pytest.approx(0.9 + 1 / 41)
    assert run.grid is not None and run.grid.name == "samples_0000040.png"
    assert run.cards["frechet"]["value"] == 0.9 and read(four[3]).grid is None


def test_only_what_differs_is_shown(four):
    rows = dict(differences([read(folder) for folder in four]))
    assert rows["optim.lr"] == [1e-3, 1e-3, 2e-3, 1e-3]
    assert rows["schedule.steps"] == ["-", 200, "-", "-"]
    assert "data._target_" not in rows and rows["model._target_"][2].endswith("VAE")


def test_runs_are_ranked_by_what_all_were_measured_by(four):
    names = [run.folder.name for run in rank_runs([read(folder) for folder in four])]
    assert names == ["ddpm", "gpt", "gan", "vae"]
    runs = [read(folder) for folder in four]
    del runs[1].cards["frechet"]
    assert [run.folder.name for run in rank_runs(runs)] == ["gan", "ddpm", "vae", "gpt"]  # nothing in common: as given


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 500}, "protocol.n is 1000 in .*gan and 500 in .*other"),
        ({"extractor": {"name": "classifier", "sha256": "xyz"}}, "protocol.extractor.sha256 is abc in .* and xyz in"),
        ({"dtype": "bf16"}, "protocol.dtype is None in .* and bf16 in"),
        ({"shape": [1, 16, 16]}, r"protocol.shape is \[1, 8, 8\] in .*gan and \[1, 16, 16\] in .*other"),
        (
            {"data_checksum": "2222"},
            "protocol.data_checksum is 1111 in .* and 2222 in .*other; evaluate both on the same",
        ),
    ],
)
def test_cards_that_differ_in_one_field_are_not_ranked(four, tmp_path, changed, message):
    other = write(tmp_path / "other", protocol={**PROTOCOL, **changed})
    with pytest.raises(UserError, match=f"cards of frechet cannot be ranked: {message}"):
        check_protocols([read(four[0]), read(other)])
    check_protocols([read(folder) for folder in four])


def test_cards_that_do_not_say_which_data_they_are_of_are_ranked_among_themselves(tmp_path):
    old = {name: value for name, value in PROTOCOL.items() if name not in ("shape", "data_checksum")}
    new, *olds = (
        write(tmp_path / name, protocol=own) for name, own in (("new", PROTOCOL), ("old", old), ("older", old))
    )
    check_protocols([read(folder) for folder in olds])
    for pair in ([new, olds[0]], [olds[0], new]):
        with pytest.raises(UserError, match=r"that of .*old is from before cards said which data .* evaluate it again"):
            check_protocols([read(folder) for folder in pair])


def compare(*arguments):
    return python("-m", "genai.compare", *arguments)


def test_from_the_command_line(four, tmp_path):
    done = compare(*four, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("ddpm") < done.stdout.index("gpt") < done.stdout.index("vae")
    with (tmp_path / "out" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["frechet"] for row in rows] == ["0.3", "0.6", "0.9", "2.0"] and rows[0][
        "frechet beats baseline"
    ] == "True"
    assert "val/loss" not in rows[0]  # losses of four families say nothing of each other
    write(tmp_path / "other", protocol={**PROTOCOL, "split": "val"})
    (tmp_path / "empty").mkdir()
    for given, message in (
        ([four[0], tmp_path / "other"], "protocol.split is test in"),
        ([tmp_path / "empty"], "holds no run: name run directories"),
        ([tmp_path / "none"], "holds no run: name run directories"),
    ):
        done = compare(*given, "--out", tmp_path / "no")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "no").exists()
    done = compare(four[0], tmp_path / "other", "--unranked", "--out", tmp_path / "both")
    assert done.returncode == 0, done.stderr


def test_the_page_names_nothing_outside_itself(four):
    page = report([read(folder) for folder in four])
    inline = r'src="data:image/png;base64,([^"]+)"'
    assert not re.search(r"https?:|//|@import|<script|<link|url\(|src=", re.sub(inline, "", page))
    images = re.findall(inline, page)
    assert len(images) == page.count("<img") == 6
    sizes = [Image.open(stdlib_io.BytesIO(base64.b64decode(image))).size for image in images]
    assert sizes == [(30, 20), (8, 8)] * 3
    assert "&lt;b&gt;&amp; once" in page and "<b>" not in page


def test_the_page_marks_what_beats_its_baselines_and_what_memorises(four):
    runs = read_all(four)
    assert [run.label for run in runs] == ["gan", "ddpm", "vae", "gpt"]
    page = report(runs)
    marks = dict(re.findall(r"</span>(\w+)</span><span class=\"value\">[\d.]+ (.)", page))
    assert marks == {"gan": "\u2717", "ddpm": "\u2713", "vae": "\u2717", "gpt": "\u2713"}
    assert page.count("<em>gmm</em>") == page.count("<em>real data</em>") == 1 and "lower is better" in page
    assert (
        "n 1000, split test, shape [1, 8, 8], data_checksum 1111, extractor.name classifier" in page
        and "memorises" not in page
    )
    runs[0].cards["frechet"]["memorised"] = True
    runs[1].cards["frechet"]["protocol"] = {**PROTOCOL, "n": 7}
    page = report(runs)
    assert "memorises its training data" in page and "n 1000" not in page  # only what all share
    runs[3].cards["frechet"]["why"] = "no better than a <mixture>"
    few = {"memorised": None, "memorised_reason": "too few to tell: 30 samples and 8 held-out items"}
    runs[2].cards["frechet"] |= few
    assert "whether it memorises: too few to tell: 30 samples" in report(runs)
    assert '<p class="note">no better than a &lt;mixture&gt;</p>' in report(runs)
    assert [row["memorised"] for row in table(runs)] == [True, False, "too few to tell", False]


def test_nothing_that_a_run_says_becomes_part_of_the_page(four, tmp_path):
    """Its cards, names, curves and config may come from somebody else; nor is a file shown that only a link puts there."""
    attack = "<script>alert(1)</script>"
    folder = write(tmp_path / f"r{attack.replace('/', '')}", optimizer={attack: attack})
    card = json.loads((folder / "cards" / "frechet.json").read_text())
    card |= {"better": attack, "metric": attack, "baselines": {attack: 1.0}, "protocol": {attack: attack}}
    (folder / "cards" / "frechet.json").write_text(json.dumps(card))
    with (folder / "metrics.csv").open("a") as file:
        file.write(f"1,{attack},1.0\n2,{attack},2.0\n")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "samples" / "samples_0000099.png").symlink_to(tmp_path / "secret.png")
    (folder / "samples" / "samples_0000098.txt").symlink_to(tmp_path / "secret.png")
    page = report([read(folder), read(four[0])])
    assert "&lt;script&gt;" in page and "<script" not in page
    assert base64.b64encode(b"secret").decode() not in page and "secret" not in page


def test_a_curve_of_one_point_or_of_nothing(tmp_path):
    one = Run(tmp_path, {}, {"a": [(5, 2.0)], "b": [(1, float("nan"))]})
    (line,) = chart("a", [one])["lines"]
    assert line["dot"] == ("356.0", "150.0") and chart("b", [one]) is None


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_opens_in_a_browser_without_errors(four, tmp_path):
    (tmp_path / "report.html").write_text(report([read(folder) for folder in four]))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ]
    log = ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"]
    for width in (1280, 390):
        picture = tmp_path / f"{width}.png"
        done = subprocess.run(
            [
                "chromium",
                *flags,
                *log,
                f"--window-size={width},900",
                f"--screenshot={picture}",
                f"file://{tmp_path}/report.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and picture.exists(), done.stderr[-2000:]
        assert "CONSOLE" not in done.stderr
