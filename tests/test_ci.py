"""The workflow runs what the README's own run does, on every Python that the package says it supports."""

import re
import tomllib

import yaml

from tests.conftest import ROOT

JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_the_workflow_runs_the_checks_on_every_python_of_the_package():
    assert commands("test") == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    classifiers = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert JOBS["test"]["strategy"]["matrix"]["python"] == classifiers
    assert PROJECT["requires-python"] == f">={classifiers[0]}"


def test_the_workflow_builds_the_documentation_and_a_typed_wheel():
    run = commands("docs-and-wheel")
    assert "mkdocs build --strict" in run
    assert "python -m benchmarks.results --check" in run
    (listed,) = [command for command in run if command.startswith("unzip")]
    assert all((ROOT / name.replace("genai/conf", "conf")).exists() for name in listed.split()[3:])
