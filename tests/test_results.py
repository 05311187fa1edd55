"""Pages of results say what their records say, and records say where they come from; a benchmark leaves such a record."""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import common, quality, recipes, results
from tests.conftest import ROOT


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def test_every_record_says_command_commit_hardware_and_date():
    found = list(results.records())
    assert len(found) > 40
    for where, record in found:
        assert all(record.get(key) for key in results.NEEDED), where
        assert record["command"].startswith("python "), where
        assert datetime.date.fromisoformat(record["date"]), where
        assert re.fullmatch("[0-9a-f]{7,40}", record["commit"]), where
        for name, figure in record["figures"].items() if "seed" in record else ():
            assert isinstance(figure["value"], int | float), (where, name)
            assert ("commit" in figure) == ("date" in figure), (where, name)


def test_the_commits_of_records_exist():
    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("there is no git history here")
    text = "".join(path.read_text() for path in common.RESULTS.glob("*.json"))
    for commit in set(re.findall(r'"commit": "(\w+)"', text)):
        assert git("cat-file", "-t", commit) == "commit", commit


def test_pages_have_the_figures_of_their_records():
    for path, text in results.pages().items():
        assert path.read_text() == text, f"{path.name} differs from the records: {results.REPAIR}"
    assert "<!-- results: begin -->" in (ROOT / "README.md").read_text()
    assert len(results.models().splitlines()) <= 20


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The records and pages in a folder of their own."""
    for name in ("docs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def check(monkeypatch, *arguments: str) -> int:
    """The exit code of `python -m benchmarks.results`."""
    monkeypatch.setattr(sys, "argv", ["results", *arguments])
    try:
        results.main()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    return 0


@pytest.mark.parametrize("name", ["recipes", "unet_cpu", "gpu_nvidia_h100_80gb_hbm3"])
def test_a_figure_that_differs_from_its_record_is_found(copy, monkeypatch, capsys, name):
    assert check(monkeypatch, "--check") == 0
    path = copy / "benchmarks" / "results" / f"{name}.json"
    content = json.loads(path.read_text())
    if name == "recipes":
        content["gan_digits"]["runs"][0]["figures"]["frechet"]["value"] = 7.1
    else:
        (content["parts"]["unet"]["figures"] if "parts" in content else content)["rows"][1]["speedup of genai"] = 3.21
    path.write_text(json.dumps(content))
    assert check(monkeypatch, "--check") == 2
    assert "differs from the records in benchmarks/results: run python -m benchmarks.results" in capsys.readouterr().err
    assert check(monkeypatch) == 0
    written = (copy / "docs" / "results.md").read_text()
    assert ("7.1 [7.4, 10.3]" if name == "recipes" else "| 3.21 |") in written
    assert ("Fréchet distance 7.1" in (copy / "README.md").read_text()) == (name == "recipes")
    assert check(monkeypatch, "--check") == 0


BROKEN = {
    b"{": "cannot be read",
    b"": "cannot be read",
    b"\xff\xfe": "cannot be read",
    b"[]": "holds no keys",
    b"{}": "holds no keys",
    b'{"parts": 3}': "is not a record",
    b'{"a": 3}': "",
    b'{"command": "python x"}': "has no commit",
}


@pytest.mark.parametrize("name", ["recipes", "unet_cpu", "gpu_nvidia_h100_80gb_hbm3", "new"])
@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_record_is_named_in_one_sentence(copy, monkeypatch, capsys, name, content):
    (copy / "benchmarks" / "results" / f"{name}.json").write_bytes(content)
    assert check(monkeypatch, "--check") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"benchmarks/results/{name}.json ") and said.count("\n") == 1
    assert BROKEN[content] in said or (name == "recipes" and "is not a record" in said)


def test_a_recipe_that_the_pages_show_is_missed(copy, monkeypatch, capsys):
    path = copy / "benchmarks" / "results" / "recipes.json"
    content = json.loads(path.read_text())
    del content["gan_digits"]
    path.write_text(json.dumps(content))
    assert check(monkeypatch, "--check") == 2
    assert "recipes.json has no gan_digits" in capsys.readouterr().err


def test_a_page_names_a_table_that_exists(copy, monkeypatch):
    (copy / "docs" / "page.md").write_text("<!-- results: begin quality -->\n<!-- results: end -->\n")
    assert check(monkeypatch) == 0
    assert "| ddim | 1 | 2.98 |" in (copy / "docs" / "page.md").read_text()
    (copy / "docs" / "page.md").write_text("<!-- results: begin qualty -->\n<!-- results: end -->\n")
    monkeypatch.setattr(sys, "argv", ["results"])
    with pytest.raises(SystemExit, match=r"page.md: the marked table 'qualty' must be one of models, .*quality"):
        results.main()


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 1.5, 2], ["1.0", "1.5", "2.0"]),
        ([0.932, 0.99, 1.0], ["0.932", "0.990", "1.000"]),
        ([1.0, 0.09814, 2.515], ["1.000", "0.098", "2.515"]),
        ([110.384, 89.551, None], ["110.4", "89.6", ""]),
        ([62345.68, 512.25], ["62,346", "512"]),
        ([2.98, 19.744, "-"], ["2.98", "19.74", "-"]),
        ([857, 16194], ["857", "16194"]),
        ([0.0, 0.0], ["0.0", "0.0"]),
    ],
)
def test_the_numbers_of_a_column_have_as_many_decimals(values, shown):
    assert results.column(values) == shown


def test_the_picture_of_solvers_has_the_samplers_there_are(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["quality"])
    monkeypatch.setattr(quality, "PICTURE", tmp_path / "quality.png")
    quality.main()
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    names = {row["sampler"] for row in results.load("quality_cpu")["rows"]}
    assert names >= set(quality.STOCHASTIC)
    assert all((ROOT / "conf" / "sampler" / f"{name}.yaml").exists() for name in names)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A function that reports rows as a benchmark would, and returns the record that is there then."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "left_out", [])
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/speed.py", "--rounds", "3"])
    monkeypatch.delenv(common.PART, raising=False)

    def call(rows, toy=False, missing=()):
        common.left_out[:] = missing
        common.report("speed", argparse.Namespace(toy=toy), torch.device("cpu"), rows, rounds=3)
        return json.loads((tmp_path / "speed_cpu.json").read_text())

    return call


def test_a_benchmark_leaves_a_record_that_says_where_it_comes_from(report, monkeypatch):
    monkeypatch.setenv("COMMIT", "abcdef0")
    record = report([{"system": "genai", "ms": 1.0}])
    assert record["command"] == "python -m benchmarks.speed --rounds 3"
    assert (record["commit"], record["date"]) == ("abcdef0", datetime.date.today().isoformat())
    assert record["hardware"]["torch"] == torch.__version__
    assert (record["rounds"], record["rows"]) == (3, [{"system": "genai", "ms": 1.0}])


def test_a_toy_run_leaves_the_record_as_it_is(report):
    first = report([{"system": "genai", "ms": 1.0}])
    assert report([{"system": "genai", "ms": 9.0}], toy=True) == first


def test_rows_of_a_missing_package_stay_with_their_commit(report, monkeypatch):
    monkeypatch.setenv("COMMIT", "abcdef0")
    first = report([{"system": "genai", "ms": 1.0}, {"system": "litgpt", "ms": 2.0}])
    monkeypatch.setenv("COMMIT", "1234567")
    for _ in range(2):  # and once more, which must not renew their commit
        second = report([{"system": "genai", "ms": 1.5}], missing=["litgpt"])
        old = {"measured": {key: first[key] for key in ("commit", "date", "hardware")}, "system": "litgpt", "ms": 2.0}
        assert second["rows"] == [{"system": "genai", "ms": 1.5}, old]
        assert (second["commit"], second["left_out"]) == ("1234567", ["litgpt"])
    assert "commit `abcdef0`" in results.table(second["rows"])
    assert "measured" not in results.table(first["rows"])
    third = report([{"system": "genai", "ms": 1.4}])  # everything is installed, and litgpt is no longer measured
    assert third["rows"] == [{"system": "genai", "ms": 1.4}]
    assert "left_out" not in third


def test_the_commit_is_that_of_the_code_and_changes_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert common.origin()["commit"] is None

    def commit(message):
        for arguments in (["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", message]):
            subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for folder in ("genai", "conf", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("1")
    code = commit("code")
    (tmp_path / "docs" / "file").write_text("2")
    assert commit("docs") != code
    assert common.origin()["commit"] == code
    assert "uncommitted" not in common.origin()
    (tmp_path / "genai" / "file").write_text("2")
    assert common.origin()["uncommitted"]


CARD = {"metric": "frechet", "value": 8.1, "low": 7.0, "high": 9.2, "floor": 8.4, "memorised": False, "why": "words"}
FACTS = {"bits_per_dim": 2.03, "standard_error": 0.015, "bound": "upper bound", "nats": 90.0, "split": "test"}


def test_figures_of_what_evaluate_prints():
    found = recipes.printed(f"words\n{json.dumps(FACTS)}\n{json.dumps(CARD)}\n")
    assert found["frechet"] == {"value": 8.1, "low": 7.0, "high": 9.2, "reference": 8.4}
    assert found["bits_per_dim"] == {"value": 2.03, "standard_error": 0.015, "bound": "upper bound"}
    assert found["memorised"] == {"value": False}
    assert recipes.printed(json.dumps(FACTS), ", ode")["bits_per_dim, ode"]["value"] == 2.03


def test_a_recipe_measured_again_keeps_the_figures_that_its_commands_lack():
    old = {"commit": "a", "date": "d", "hardware": {"cpu": "x"}}
    figures = {"frechet": {"value": 9.0}, "elbo": {"value": -91.0}, "seconds": {"value": 5}}
    entry = {"runs": [{"seed": 0, **old, "figures": figures}, {"seed": 1, **old, "figures": {}}]}
    new = {"commit": "b", "date": "e", "hardware": {"cpu": "y"}}
    recipes.renew(entry, 0, {"frechet": {"value": 8.1}, "nats": {"value": 1.0}, "seconds": {"value": 4}}, new)
    elbo = {"commit": "a", "date": "d", "value": -91.0}
    expected = {"frechet": {"value": 8.1}, "seconds": {"value": 4}, "elbo": elbo}
    assert entry["runs"] == [{"seed": 0, **new, "figures": expected}, {"seed": 1, **old, "figures": {}}]
    with pytest.raises(SystemExit, match="none of the recipe's figures was found"):
        recipes.renew(entry, 0, {"seconds": {"value": 4}}, new)


def test_a_recipe_runs_its_commands_in_turn(tmp_path):
    train, evaluate, run = tmp_path / "train.py", tmp_path / "evaluate.py", tmp_path / "run"
    train.write_text(
        "import pathlib, sys\nrun = pathlib.Path(sys.argv[2])\nrun.mkdir()\n"
        "(run / 'metrics.csv').write_text(f'step,name,value\\n0,val/loss,3\\n{sys.argv[1]},val/loss,1.5\\n')"
    )
    evaluate.write_text(f"import sys\nassert sys.argv[1] == {str(run)!r}\nprint({json.dumps(CARD)!r})")
    commands = [f"python {train} {{seed}} {{run}}", f"python {evaluate} {{run}} likelihood=ode"]
    found = recipes.perform(commands, 7, run, ["data.root=here"])
    assert found["val/loss"] == {"value": 1.5}
    assert found["frechet, ode"]["value"] == 8.1
    assert found["seconds"]["value"] >= 0


def test_the_commands_of_recipes_are_those_of_the_entry_scripts():
    for name, entry in results.load("recipes").items():
        assert entry["section"] in results.SECTIONS, name
        first, *others = entry["commands"]
        assert first.startswith("python train.py ") and "seed={seed}" in first and "run_dir={run}" in first, name
        assert all("{run}" in command for command in others), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["solvers", "folder", "gan", "recipes vae_digits"])
def test_a_benchmark_runs_at_toy_size_and_leaves_its_record(name):
    before = {path: path.read_text() for path in common.RESULTS.glob("*.json")}
    done = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{name}".split(), "--toy"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("bits_per_dim" if "recipes" in name else "stays as it is") in done.stdout
    assert {path: path.read_text() for path in common.RESULTS.glob("*.json")} == before
