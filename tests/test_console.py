"""The console command `genai`: from a checkout, and from an installed wheel, which has no scripts."""

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import genai
from tests.conftest import ROOT, python

TINY = ["debug=true", "sampler.steps=2", "callbacks.samples.n=2", "logger=none"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def console(*arguments, **given):
    return subprocess.run(
        [sys.executable, "-m", "genai", *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT, **given
    )


def test_help_of_the_console_command_answers_at_once():
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "genai", "--help"], capture_output=True, text=True, cwd=ROOT
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done

    taken, done = min((seconds() for _ in range(3)), key=lambda pair: pair[0])
    assert done.returncode == 0
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "genai.commands" in loaded and not loaded & {"torch", "hydra", "omegaconf", "numpy"}
    assert taken < 0.6
    for command in ("train", "sample", "evaluate", "compare", "baselines"):
        assert f"  genai {command} " in done.stdout
    assert console().returncode == 2
    assert console("--version").stdout == f"genai {genai.__version__}\n"


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_a_command_lists_its_keys_as_its_script_does(command):
    assert python("-m", "genai", command, "--help").stdout == python(f"{command}.py", "--help").stdout != ""


def test_wrong_commands_are_answered_in_one_sentence():
    for wrong, sentence in {
        (
            "trian",
        ): "the command must be one of train, sample, evaluate, compare, baselines, got trian, did you mean train?",
        ("train", "max_step=3"): "no key max_step, did you mean max_steps?",
        ("compare",): "the following arguments are required: runs",
        ("baselines", "data=digts"): "did you mean digits?",
    }.items():
        done = python("-m", "genai", *wrong)
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("module", "typed"), [("train.run", "train"), ("sampling", "sample"), ("evaluation.run", "evaluate")]
)
def test_a_module_that_is_no_command_names_the_command(module, typed):
    done = python("-m", f"genai.{module}")
    assert done.returncode != 0 and f"type genai {typed}" in done.stderr


def test_baselines_are_found_by_the_name_of_their_former_place():
    assert "trivial models" in python("-m", "genai.baselines", "--help").stdout


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("genai ", "train sample evaluate compare baselines"),
        ("genai ev", "train sample evaluate compare baselines"),
        ("genai train model=ddpm_", "model=ddpm_levels model=ddpm_mlp"),
        ("genai train max_steps=3 see", "seed="),
        ("genai evaluate spl", "split="),
        ("genai compare r", ""),
    ],
)
def test_completion_answers_for_the_command_that_is_typed(line, answer):
    done = python("-m", "genai", "-sc", "query=bash", env={**os.environ, "COMP_LINE": line})
    assert done.stdout.strip() == answer, done.stderr


def test_a_package_without_its_scripts_finds_its_configs_and_starts_itself(tmp_path):
    """Laid out as the wheel is, which the slow test below builds."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["genai"], "force-include": {"conf": "genai/conf"}}
    assert PROJECT["name"] == "genai-lab" and PROJECT["scripts"] == {"genai": "genai.commands:main"}
    shutil.copytree(ROOT / "genai", tmp_path / "site" / "genai", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "site" / "genai" / "conf")
    script = (
        "import genai.sweeps, genai.cli; print(genai.__file__, *genai.sweeps.train_command()[1:], genai.cli.conf_dir())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    package = tmp_path / "site" / "genai"
    assert done.stdout == f"{package / '__init__.py'} -P -m genai train {package / 'conf'}\n", done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built and installed without a checkout in sight; a function that runs its command in an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    built = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", *built, "-w", folder / "dist", ROOT], check=True, timeout=300)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=120)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (own / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    (wheel,) = (folder / "dist").glob("genai_lab-*.whl")
    prefix = ["--python", folder / "venv" / "bin" / "python"]
    subprocess.run([*pip, *prefix, "install", "--no-deps", wheel], check=True, timeout=120)
    empty = folder / "empty"
    empty.mkdir()
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**kept, "PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}"}

    def run(*command, code=0, **more):
        done = subprocess.run(
            [*map(str, command)], cwd=empty, env={**environment, **more}, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run, empty, own


@pytest.mark.slow
def test_an_installed_wheel_trains_samples_measures_and_compares(installed):
    run, empty, own = installed
    script = "import genai, genai.cli; print(genai.__file__); print(genai.cli.conf_dir())"
    assert run("python", "-c", script).split() == [str(own / "genai" / "__init__.py"), str(own / "genai" / "conf")]
    assert (own / "genai" / "py.typed").is_file() == (ROOT / "genai" / "py.typed").is_file()
    assert run("genai", "--version") == f"genai {genai.__version__}\n"
    run("genai", "train", "experiment=ddpm_toy2d", *TINY, "run_dir=toy")
    assert "2 samples of " in run("genai", "sample", "ckpt=toy", "n=2")
    card = json.loads(run("genai", "evaluate", "ckpt=toy", "metrics=[frechet]", "n=20", "repeats=2", "split=val"))
    assert card["metric"] == "frechet"
    assert "toy" in run("genai", "compare", "toy", "--out", "page") and (empty / "page" / "report.html").is_file()
    run("python", "-m", "genai", "train", *TINY, "run_dir=digits")
    run("python", "-c", f"import genai; genai.train([*{TINY}, 'run_dir=python'])")
    run("genai", "trian", code=2)


@pytest.mark.slow
def test_an_installed_wheel_sweeps_and_trains_on_two_processes(installed):
    run, empty, _ = installed
    run("genai", "train", "-m", *TINY, "seed=0,1")
    assert len(list(empty.glob("runs/sweeps/ddpm_digits-*/*/checkpoints/last.ckpt"))) == 2
    run("genai", "train", *TINY, "trainer.devices=2", "trainer.accelerator=cpu", "run_dir=two")
    assert (empty / "two" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_bash_completes_the_installed_command(installed):
    run, _, _ = installed
    script = """
    eval "$(genai -sc install=bash)"
    COMP_LINE="genai train model=ddpm_"; COMP_WORDS=($COMP_LINE); COMP_CWORD=2; hydra_bash_completion
    echo "${COMPREPLY[@]}"; complete -p genai
    """
    out = run("bash", "-c", script)
    assert "model=ddpm_levels model=ddpm_mlp" in out and "hydra_bash_completion genai" in out
