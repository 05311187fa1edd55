"""The plan of docs/architecture.md holds: who may import whom, read off its list of rooms and the source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each room imports only from rooms in rows above its own, and from itself; rooms of one row never import each other.
PLAN = (ROOT / "docs" / "architecture.md").read_text()
ROWS = [line.split() for line in PLAN.partition("## Rooms")[2].split("```")[1].splitlines()[1:]]
LEVEL = {room: i for i, row in enumerate(ROWS) for room in row}
# Heavy packages and the only rooms that may import them anywhere.
ONLY = {"lightning": ["train"], "triton": ["kernels"], "wandb": ["train"], "hydra": ["cli", "checkpoint", "sweeps"]}
FILES = sorted((ROOT / "genai").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "genai").with_suffix("").parts[0]


def imports(path: Path, top_only: bool = False, members: bool = False):
    """Absolute names of the modules a file imports, or with `members` of what it imports from them; `if TYPE_CHECKING` blocks do
    not count."""
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
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from inner if members or node.module == "genai" else [node.module]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_from_rooms_above(path):
    here = room(path)
    assert here in LEVEL, f"{here} is not in the plan: add it to the rooms of docs/architecture.md"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "genai" and len(parts) > 1 and parts[1] != here:
            assert LEVEL[parts[1]] < LEVEL[here], f"{path.relative_to(ROOT)} imports {name}, a room not above its own"
        if parts[0] in ONLY:
            assert here in ONLY[parts[0]], f"{path.relative_to(ROOT)} imports {parts[0]}, which is for {ONLY[parts[0]]}"
        if parts[:2] == ["genai", "models"] and here == "models" and len(parts) > 2:
            family = path.relative_to(ROOT / "genai" / "models").parts[0]
            assert parts[2] == family, f"{path.relative_to(ROOT)} imports another family, {name}"


def test_every_room_of_the_plan_exists():
    rooms = {room(path) for path in FILES}
    assert rooms == set(LEVEL)


def test_tests_are_laid_out_as_the_package_is():
    tests = [path.relative_to(ROOT / "tests").parent for path in (ROOT / "tests").rglob("test_*.py")]
    assert len({*tests}) > 12
    for folder in tests:
        assert (ROOT / "genai" / folder).is_dir(), folder


def test_no_module_imports_itself_by_way_of_others():
    """In functions too: each circle is a pair of modules that know each other."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

    def modules(path):
        found = imports(path, members=True)
        return {name if name in names else name.rpartition(".")[0] for name in found} & names.keys()

    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter({name: modules(path) for name, path in names.items()}).prepare()


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
    """Where code goes by what kind of data it is given, and not by its modality: by a field's name, as by a comparison with a
    string, a table, `match` or a call; by what a kind of data leaves, such as a tokenizer; by the class of a modality."""
    named = {"field"}

    def is_field(node):
        match node:
            case ast.NamedExpr(value=value):
                return is_field(value)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name in named
            case ast.Subscript(slice=key):
                return is_word("field")(key)
            case ast.Call(args=args):
                return any(map(is_word("field"), args))
        return False

    def is_word(*words):
        return lambda node: (
            isinstance(node, ast.Constant) and type(node.value) is str and node.value in (words or [node.value])
        )

    def is_fixed(node):
        """A string, a constant by name, or a literal that holds one."""
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name.isupper()
            case ast.Dict(keys=held) | ast.Tuple(elts=held) | ast.List(elts=held) | ast.Set(elts=held):
                return any(map(is_fixed, held))
        return is_word()(node)

    nodes = [*ast.walk(tree)]
    for node in nodes:  # other names of a field
        if isinstance(node, ast.Assign | ast.NamedExpr) and is_field(node.value):
            named |= {
                t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)
            }
    for node in nodes:
        match node:
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                contains = any(isinstance(op, ast.In | ast.NotIn) for op in ops)
                asked = any(map(is_field, sides)) and any(map(is_fixed, sides))
                asked |= contains and is_word(*LEFT)(left)
            case ast.Match(subject=subject):
                asked = is_field(subject)
            case ast.Subscript(value=table, slice=key):
                asked = is_field(key) and is_fixed(table)
            case ast.Call(func=ast.Attribute(value=owner), args=args):
                asked = is_field(owner) or (any(map(is_field, args)) and (is_fixed(owner) or any(map(is_word(), args))))
            case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[_, name, *_]):
                asked = is_word(*LEFT)(name)
            case ast.ImportFrom(module="genai.modalities"):
                asked = True
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("genai.modalities."):
                asked = not module.endswith(".base") and any(name.name[0].isupper() for name in names)
            case _:
                asked = False
        if asked:
            yield node


LEFT = {"tokenizer", "pixels", "class_names", "image", "vector"}
OWN = ("modalities", "data")
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
ASKED = """
data.field == "tokens"
"image" != field
field in ("a", "b")
"tokenizer" in x
"image" not in batch
d.get("field") == "a"
d["field"] == "a"
getattr(x, "field", None) == "a"
field != FIELD
x.field in base.KINDS
KINDS[baseline.field]
{"a": f, "b": g}[field]
{"a": f}.get(x.field)
KINDS.get(x.field)
x.field.startswith("tok")
re.match("tok", x.field)
(kind := x.field) == "a"
kind = x.field; kind == "a"
hasattr(data, "tokenizer")
from genai.modalities.text import Text; isinstance(x.modality, Text)
from genai.modalities import text; isinstance(x.modality, text.Text)
"""
FREE = """
model.field != data.field
field not in batch
name == "tokens"
batch[data.field]
rows.get(data.field, [])
from genai.modalities.base import Modality
from genai.modalities.image import to_uint8
"""


def test_only_modalities_and_data_know_kinds_of_data():
    for code in [*ASKED.strip().splitlines(), "match x.field:\n    case 'a': pass"]:
        assert [*kinds_asked_for(ast.parse(code))], f"{code} asks what kind of data this is"
    for code in FREE.strip().splitlines():
        assert not [*kinds_asked_for(ast.parse(code))], f"{code} asks nothing"
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
