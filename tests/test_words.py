"""The words of the project: retired ones stay out of code, configs, docs and log keys, and docstrings open as sentences."""

import ast
import re
import subprocess

import pytest

from tests.conftest import ROOT

RETIRED = {  # a pattern of words, case ignored -> what to write instead
    r"players?": "generator and discriminator, networks, or parameter groups",
    r"deceiv(e|es|ed|ing)": "generator update",
    r"judges?|judged|judging": "classifier, target model, or verify",
    r"copiers?": "training-set copy",
    r"beside": "on top of, next to, or also",
    r"blamed?": "the cause that an error names",
    r"told": "given, or printed",
    r"the house|the nouns": "the project, or the protocols",
}
WORDS = re.compile(rf"(?<![a-z])({'|'.join(RETIRED)})(?![a-z])", re.IGNORECASE)  # inside snake_case names too
FORMAT = "# fmt" + ": skip"
# Old names that still load are listed in tables, and the list of changes and this list name them too.
TABLES = {"CHANGELOG.md", "genai/core/stored.py", "tests/core/test_stored.py", "tests/test_words.py"}
OLD = {"genai/compare/runs.py": {"Judge"}}  # values of older files that these modules still read
FRAGMENT = re.compile(
    r"^(Of|What|Whether|How|Where|When|Who|Whose|Which|As|By|Those|That|Why|From|For|In|With|Without|Their|Its|And)\b|^[a-z(`]"
)


def tracked(*patterns: str) -> list[str]:
    """Paths of the files that git tracks, or would, relative to the root; the record of old checkpoints keeps its words."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for path in listed.stdout.splitlines() if not path.startswith("tests/checkpoint/old/")]


def test_retired_words_stay_out_of_code_configs_and_docs():
    found = []
    for path in tracked("*.py", "*.yaml", "*.md", "*.toml", "*.html"):
        if path in TABLES or not (ROOT / path).is_file():
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            words = {match[0] for match in WORDS.finditer(line)} - OLD.get(path, set())
            found += [f"{path}:{number}: {word}, write {instead(word)}" for word in sorted(words)]
            if FORMAT in line and path.endswith(".py"):
                found.append(f"{path}:{number}: {FORMAT}, let ruff format it")
    assert not found, "\n".join(found)


def instead(word: str) -> str:
    return next(better for pattern, better in RETIRED.items() if re.fullmatch(pattern, word, re.IGNORECASE))


def test_public_docstrings_open_as_sentences():
    found, documented = [], 0
    for path in tracked("genai/*.py"):
        nodes = [("", node) for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body]
        while nodes:
            prefix, node = nodes.pop()
            if isinstance(node, ast.If | ast.Try):
                nodes += [(prefix, child) for child in node.body]
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                nodes += [(f"{prefix}{node.name}.", child) for child in node.body]
            text = ast.get_docstring(node) or ""
            documented += bool(text)
            if FRAGMENT.match(text):
                found.append(f"{path}:{node.lineno} {prefix}{node.name}: {text.splitlines()[0]}")
    assert documented > 1000 and not found, "\n".join(found)


@pytest.mark.parametrize("line", ["two Players", "d_player = 1", "the judge's", "self.told", "Beside it"])
def test_the_pattern_finds_words_and_parts_of_names(line):
    assert WORDS.search(line)


@pytest.mark.parametrize("line", ["besides", "untold", "displayers", "prejudged", "adjudge"])
def test_the_pattern_leaves_other_words_alone(line):
    assert not WORDS.search(line)
