"""Notebooks are committed with the outputs of a real execution, and run from top to bottom with few steps."""

import ast
import json
import os
import re

import pytest

from tests.conftest import ROOT

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 400_000
SHOWS = re.compile(r"plt\.(plot|bar|imshow|scatter|show|subplots|figure|semilogx)|print|show|plot|train|genai\.train")
"""Functions whose call at the top of a cell leaves an output."""


def shows(source):
    """Whether a cell calls, outside of functions that it defines, something that leaves an output."""
    top = [node for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef)]
    calls = [node for statement in top for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(SHOWS.fullmatch(ast.unparse(call.func)) for call in calls)


def text_of(output):
    data = output.get("data", {})
    return "".join([output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_outputs_and_starts_no_process(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < MOST_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = 0
    for cell in code:
        assert not re.search(r"subprocess|os\.system|^\s*[!%]", cell.source, re.MULTILINE), cell.source
        assert cell.execution_count is not None, cell.source
        assert cell.outputs or not shows(cell.source), cell.source
        for output in cell.outputs:
            said = text_of(output)
            assert output.output_type != "error", said
            if output.get("name") == "stderr":  # progress alone
                assert all(re.search(r" (left|so far)$", line) for line in said.splitlines()), said
            assert not re.search(r"[Ww]arning|Traceback|(?<![\w.])/(tmp|home|root|usr|work|Users)/", said), said
            pictures += "image/png" in output.get("data", {})
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], "run it from top to bottom, once"
    assert pictures >= 5 and len(code) >= 5
    assert all(name in json.dumps(notebook) for name in ("genai.compose", "genai.train", "genai.load"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_STEPS", "20")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    shown = [bool(cell.get("outputs")) for cell in notebook.cells]
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[])
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert [bool(cell.get("outputs")) for cell in notebook.cells] == shown
    assert os.environ["NOTEBOOK_STEPS"] == "20"
