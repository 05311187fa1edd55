"""The rooms of the house: who may import whom, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each room imports only from rooms in rows above its own, and from itself; rooms of one row never import each other.
ROWS = [
    ["core"],
    ["ranges", "nodes"],
    ["nn", "losses", "kernels", "metrics"],
    ["modalities"],
    ["data"],
    ["models"],
    ["tune"],
    ["build"],
    ["checkpoint"],
    ["export", "sampling", "judge", "cli"],
    ["extractors"],
    ["cards"],
    ["baselines"],
    ["evaluation"],
    ["train", "__init__"],
    ["compare", "sweeps"],
]
LEVEL = {room: i for i, row in enumerate(ROWS) for room in row}
# Heavy packages and the only rooms that may import them anywhere.
ONLY = {"lightning": ["train"], "triton": ["kernels"], "wandb": ["train"], "hydra": ["cli", "build", "sweeps"]}
FILES = sorted((ROOT / "genai").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "genai").with_suffix("").parts[0]


def imports(path: Path, top_only: bool = False):
    """Absolute names of the modules a file imports; `if TYPE_CHECKING` blocks do not count."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ([f"genai.{a.name}" for a in node.names] if node.module == "genai" else [node.module])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_from_rooms_above(path):
    here = room(path)
    assert here in LEVEL, f"{here} is no room of the house: add it to ROWS, and to the plan"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "genai" and len(parts) > 1 and parts[1] != here:
            assert LEVEL[parts[1]] < LEVEL[here], f"{path.relative_to(ROOT)} imports {name}, a room not above its own"
        if parts[0] in ONLY:
            assert here in ONLY[parts[0]], f"{path.relative_to(ROOT)} imports {parts[0]}, which is for {ONLY[parts[0]]}"
        if parts[:2] == ["genai", "models"] and here == "models" and len(parts) > 2:
            family = path.relative_to(ROOT / "genai" / "models").parts[0]
            assert parts[2] == family, f"{path.relative_to(ROOT)} imports another family, {name}"


def test_core_needs_torch_and_the_standard_library_only():
    for path in FILES:
        if room(path) == "core":
            for name in imports(path):
                top = name.split(".")[0]
                assert top in ("torch", "genai") or top in sys.stdlib_module_names, f"{path}: {name}"


@pytest.mark.parametrize("name", ["genai", "genai.cli", "genai.core.errors"])
def test_importing_the_door_and_the_command_line_loads_nothing_heavy(name):
    script = f"import sys, {name}; print([m for m in ('torch', 'lightning', 'wandb', 'numpy', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def kinds_asked_for(tree):
    """Comparisons of a field's name with a string, and questions whether a kind of data left something, such as a tokenizer."""

    def is_field(side):
        parts = [getattr(side, "slice", None), *getattr(side, "args", [])]
        named = "field" in (getattr(side, "id", None), getattr(side, "attr", None))
        return named or any(isinstance(part, ast.Constant) and part.value == "field" for part in parts)

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            values = [v for side in sides for v in (side, *getattr(side, "elts", [])) if isinstance(v, ast.Constant)]
            strings = {v.value for v in values if isinstance(v.value, str)}
            contains = any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
            if (strings and any(map(is_field, sides))) or (contains and strings & LEFT):
                yield node


LEFT = {"tokenizer", "pixels", "class_names"}
OWN = ("modalities", "data")
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


def test_only_modalities_and_data_know_kinds_of_data():
    asked = (
        'data.field == "tokens"',
        '"image" != field',
        'field in ("a", "b")',
        '"tokenizer" in x',
        'd.get("field") == "a"',
    )
    assert all([*kinds_asked_for(ast.parse(code))] for code in asked)
    assert not [*kinds_asked_for(ast.parse('model.field != data.field; field not in batch; name == "tokens"'))]
    for path in [*FILES, *SCRIPTS]:
        if path in SCRIPTS or room(path) not in OWN:
            found = [f"{path.relative_to(ROOT)}:{node.lineno}" for node in kinds_asked_for(ast.parse(path.read_text()))]
            assert not found, f"{found} ask what kind of data this is: that is for its modality to know"


def test_no_class_takes_a_drain_of_keywords():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__" and node.args.kwarg is not None:
                raise AssertionError(f"{path.relative_to(ROOT)}:{node.lineno} takes **{node.args.kwarg.arg}")


def test_the_value_range_changes_at_one_edge_only():
    for path in FILES:
        if path.relative_to(ROOT / "genai") != Path("modalities/image.py"):
            assert "127.5" not in path.read_text(), path
