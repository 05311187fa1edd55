"""README and docs are run: their commands and code, with few steps, and their links; "a model family" is this test."""

import collections
import contextlib
import itertools
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import soundfile
from PIL import Image

from genai import checkpoint, sweeps
from genai.cli import compose_config, prepare_sampling, prepare_training
from genai.core.errors import UserError
from tests.conftest import ROOT, SHARED, python
from tests.data.test_melodies import folder_of
from tests.pages import DOCS, PAGES, anchors, blocks, links, name, shell_lines, write_files

OWN_PAGES = [path for path in PAGES if path.name != "results.md"]  # whose commands test_results checks
README, FAMILY = ROOT / "README.md", DOCS / "extending.md"


def test_a_family_in_ones_own_package(tmp_path, command):
    """Write the page's files into an empty folder, then run its three commands there, as written."""
    write_files(FAMILY, tmp_path)
    model = (tmp_path / "my_lab" / "gaussian.py").read_text()
    assert len([line for line in model.splitlines() if line.strip()]) <= 30
    lines = shell_lines(FAMILY)
    assert len(lines) == 3
    for line in lines:
        _, script, *arguments = shlex.split(line)
        done = command(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    content = checkpoint.read(tmp_path / "runs" / "gaussian" / "checkpoints" / "last.ckpt")
    assert content["step"] == 8
    written = np.load(next(tmp_path.glob("runs/gaussian/samples/0001/samples.npz")))
    assert written["samples"].shape == (100, 1, 8, 8)
    refused = command("sample.py", "ckpt=runs/gaussian", cwd=tmp_path)
    assert refused.returncode == 2
    assert "add trust=my_lab" in refused.stderr


# Every command is one that the command line understands

TEXTS = [path.read_text() for path in [*OWN_PAGES, *(ROOT / "conf").rglob("*.yaml"), *DOCS.glob("*.yaml")]]
FREE = ["run_dir", "ckpt", "out", "codec.ckpt", "data.root", "n", "seed", "label", "debug", "max_steps", "repeats"]
"""Keys whose values are any path or number."""


def commands():
    """Return the arguments of every command of pages and configs, once where they differ in values of FREE keys only.

    Commands that only choose files of conf are left to `test_every_choice_of_pages_and_configs_is_a_file`.
    """
    found, chosen = {}, set()
    for text in TEXTS:
        for line in re.findall(r"python (?:\w+\.py|-m genai[.\w]+)(?![.\w:])[^|`\n#&;]*?(?=  |[|`\n#&;])", text):
            if re.search(r"my_lab|import_gpt2|--|=\]|\.\.\.|import_|\{|<Tab|=$", line):
                continue
            words = shlex.split(re.sub("<[^>]*>", "x", line))[1:]
            given = [word for word in words if word.partition("=")[0] not in FREE]
            if any(word.startswith(("resume=", "init_from=")) for word in words) or "genai.compare" in words:
                assert all(not word.startswith("-") for word in words[2:]), line
            elif given[0] == "train.py" and all(re.fullmatch(r"\w+=[a-z]\w*", word) for word in given[1:]):
                chosen |= {*given[1:]}
            else:
                found.setdefault(tuple(given), words)
    return sorted(found.values()), sorted(chosen)


COMMANDS, CHOSEN = commands()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_pages_and_configs_composes(words):
    """Those of sample.py, and of evaluate.py that need it, with the sampler of some model: which one, the run decides."""
    script = words[0].removesuffix(".py") if words[0] != "-m" else words[1].rpartition(".")[2]
    arguments = [word for word in words[1 if words[0] != "-m" else 2 :] if word != "-m"]
    if script in ("sample", "evaluate") and not any(word.startswith("sampler=") for word in arguments):
        text = " ".join(arguments)
        first = "gan" if "truncation" in text else "generate" if "max_new_tokens" in text else "ddim"
        own = [[]] if script == "evaluate" else []
        for sampler in [
            *own,
            *(
                [f"sampler={name}"]
                for name in dict.fromkeys([first, "ddim", "generate", "beam", "gan", "media", "retrieve"])
            ),
        ]:
            with contextlib.suppress(UserError):
                compose_config(script, [*arguments, *sampler], prepare_sampling if sampler else None)
                break
        else:
            pytest.fail("it fits no sampler")
    else:
        sweep = script == "train" and "-m" in words
        prepare = {
            "train": sweeps.prepare if "sweep=" in " ".join(words) else prepare_training,
            "sample": prepare_sampling,
        }
        compose_config(script, arguments, prepare.get(script), sweep=sweep)


@pytest.mark.parametrize("choice", CHOSEN)
def test_every_choice_of_pages_and_configs_is_a_file(choice):
    """test_configs composes and trains those of model and experiment."""
    group, _, name = choice.partition("=")
    assert (ROOT / "conf" / group / f"{name}.yaml").exists()


@pytest.mark.parametrize("path", [*OWN_PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_names_of_the_package_on_a_page_exist(path):
    """Dotted names, and what code imports."""
    text = path.read_text()
    names = {*re.findall(r"\bgenai(?:\.\w+)+", text)}
    for module, imported in re.findall(r"from (genai[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{word.split()[0]}" for word in imported.split(",")}
    for dotted in names:
        with contextlib.suppress(ModuleNotFoundError):
            pkgutil.resolve_name(dotted)
            continue
        pytest.fail(f"{dotted} is not there")


def test_contributing_and_the_nouns_of_the_architecture_exist():
    recipes = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a solver")[2]
    nouns = (DOCS / "architecture.md").read_text().partition("## Nouns")[2].partition("## Rooms")[0]
    first = "".join(re.findall(r"^\| .*? \|", nouns, re.MULTILINE))  # column
    code = "".join(path.read_text() for part in ("genai", "tests") for path in (ROOT / part).rglob("*.py"))
    for word in {*re.findall(r"`(\w+)`", recipes + first)} - {"_target_", "solver"}:
        named = re.search(rf"(?:def|class) {word}\b|^{word}\b.* = ", code, re.MULTILINE)
        assert named or (ROOT / "genai" / word).exists(), word


# Every page is run from top to bottom

SKIPPED = {  # beginnings of lines that a test cannot run
    "pip install": "it installs packages",
    "pytest": "it is this test",
    "wandb ": "it needs an account",
    "eval ": "it changes a shell",
}
RUN = [
    path for path in PAGES if path.name != "results.md" and any(b.language in ("bash", "python") for b in blocks(path))
]


def shortened(line: str) -> list[str] | None:
    """The arguments of `python` for a line of a page with few steps and samples; None for data that are not here."""
    words = shlex.split(line)[1:]
    script = words[1] if words[0] == "-m" else words[0]
    if re.search("mnist|tiny_shakespeare|cifar10|celeba", line):
        if "baselines" not in line or not (SHARED / "tinyshakespeare.txt").exists():
            return None
        return [
            *words,
            f"data.path={SHARED / 'tinyshakespeare.txt'}",
            "data.tokenizer=char",
            *([] if "baseline=" in line else ["baseline=ngram"]),
            "repeats=1",
        ]
    if script == "train.py" and "--dry-run" not in words:
        if any(word.startswith("resume=") for word in words):
            return [re.sub(r"^(max_steps|optim\.decay_steps)=\d+", r"\1=8", word) for word in words]
        words = [
            word
            for word in words
            if not re.match(r"max_steps=\d{2}|callbacks\.(cards|samples)\.(n|every_steps)=", word)
        ]
        if "logger." in line:
            return [*words, "max_steps=2", "sampler.steps=2", "callbacks.samples.n=2", "logger.timeout_seconds=1"]
        sweep = ["sweep.trials=2"] if "optuna" in line else ["sweep.over.seed=[0]"] if "sweep=" in line else []
        return [*(word.replace("seed=0,1,2", "seed=0,1") for word in words), "debug=true", *sweep]
    if script == "sample.py":
        few = [word for word in words if re.fullmatch("n=[1-4]", word)]  # as many as there are prompts
        words = [word for word in words if not re.match(r"(n|max_new_tokens)=", word)]
        images = re.search("latent|dalle|maskgit|media|contrastive", line)
        return [*words, *(few or ["n=2"]), *(["max_new_tokens=6"] if "prompt" in line and not images else [])]
    if script == "evaluate.py":
        words = [word for word in words if not word.startswith("n=")]
        return [*words, "n=16", *(["repeats=2", "baselines=false"] if "metrics=" in line else [])]
    if script == "genai.evaluation.baselines":
        return [*words, "repeats=1", *([] if "baseline=" in line else ["baseline=mixture"])]
    return words


def make_inputs(folder):
    """The files that commands of pages name: images, texts, captions."""
    random = np.random.default_rng(0)

    def picture(size=16, value=None):
        return Image.fromarray(random.integers(0, 256, (size, size), np.uint8) if value is None else value)

    half = np.zeros((8, 8), np.uint8)
    half[4:] = 255
    picture(8).save(folder / "seven.png")
    picture(value=half).save(folder / "lower_half.png")
    (folder / "sevens").mkdir()
    picture(8).save(folder / "sevens" / "a.png")
    for k in range(24):
        for place in ("photos/a", "photos/b", "captioned"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            picture().save(folder / place / f"{k}.png")
    with zipfile.ZipFile(folder / "photos.zip", "w") as file:
        for path in (folder / "photos").rglob("*.png"):
            file.write(path, path.relative_to(folder / "photos"))
    lines = "".join(f'{{"file_name": "{k}.png", "text": "picture {k % 3}"}}\n' for k in range(24))
    (folder / "captioned" / "captions.jsonl").write_text(lines)
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 200)
    (folder / "books").mkdir()
    shutil.copy(folder / "book.txt", folder / "books" / "a.txt")
    folder_of(folder / "tunes", [f"{k}.mid" for k in range(24)])
    shutil.copy(folder / "tunes" / "0.mid", folder / "theme.mid")
    for k in range(24):
        (folder / "sounds" / ("bell", "dog")[k % 2]).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "sounds" / ("bell", "dog")[k % 2] / f"{k}.wav", random.uniform(-0.5, 0.5, 2000), 8000)
    shutil.copy(folder / "sounds" / "dog" / "1.wav", folder / "beginning.wav")
    for file in ("seven", "clip"):
        shutil.copy(folder / "beginning.wav", folder / f"{file}.wav")
    (folder / "recordings").mkdir()
    for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"):
        for digit, take in itertools.product(range(10), range(8)):
            wave = random.uniform(-0.5, 0.5, random.integers(500, 1500))
            soundfile.write(folder / "recordings" / f"{digit}_{speaker}_{take}.wav", wave, 8000)
    (folder / "labels.tsv").write_text("".join(f"{w} number {i}\t{w}\n" for i in range(40) for w in ("ham", "egg")))
    (folder / "molecules.smi").write_text("CCO\nC1CCCCC1\nCC(=O)O\n" * 100)


def shorten_code(text: str) -> str:
    return re.sub(r'"max_steps=\d+"', '"debug=true"', text).replace("n=16", "n=2").replace("n=50", "n=16")


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=name)
def test_every_command_and_snippet_of_a_page_runs(path, tmp_path):
    make_inputs(tmp_path)
    prepare_page(path, tmp_path)
    code, left_out, done = "", [], None
    for block in blocks(path):
        if block.title:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text)
        elif block.language == "python":
            code += shorten_code(block.text)
            done = python("-c", f"import sys; sys.path.insert(0, '.')\n{code}", cwd=tmp_path)
            assert done.returncode == 0, f"{block.text}\n{done.stderr[-3000:]}"
        elif block.language == "bash":
            for line in [re.sub(r"^pip install .* && |\s+# .*", "", line) for line in block.text.splitlines()]:
                if not line or line.startswith(tuple(SKIPPED)) or (words := shortened(line)) is None:
                    left_out.append(line)
                    continue
                if words[0] in ("train.py", "sample.py", "evaluate.py"):
                    words[0] = str(ROOT / words[0])
                start = time.monotonic()
                done = python(*words, cwd=tmp_path)
                print(f"{time.monotonic() - start:4.0f} s  {line}")
                assert done.returncode == 0, f"{line}\n{' '.join(words)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        elif block.language == "text":  # what the last command prints
            printed = done.stdout.splitlines()
            assert all(text in printed for text in block.text.splitlines()), f"{block.text}\n{done.stdout}"
    print("left out:", *left_out, sep="\n")


def prepare_page(path, folder):
    """What a page takes from elsewhere: files of other pages, and what would be downloaded."""
    if path == README:
        write_files(FAMILY, folder)
    if path.name in ("gpt2.md", "text.md"):
        transformers = pytest.importorskip("transformers")
        tokenizers = pytest.importorskip("tokenizers")
        words = tokenizers.Tokenizer(tokenizers.models.BPE())
        words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=sorted(alphabet), special_tokens=["<|endoftext|>"]
        )
        words.train_from_iterator(["The meaning of life is a question of life"] * 3, trainer)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(
            folder / "gpt2"
        )
        sizes = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
        config = transformers.GPT2Config(vocab_size=words.get_vocab_size(), **sizes)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")


# Pages and their links


def test_readme_is_short():
    text = README.read_text()
    lines, words = len(text.splitlines()), len(text[: text.index("<!-- results: begin")].split())
    assert lines <= 130, f"README.md has {lines} lines: move some to docs/"
    assert words <= 900, f"README.md has {words} words before its table: move some to docs/"


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name)
def test_links_lead_somewhere(path):
    for target, part in links(path):
        assert target.exists(), f"{target} is not there"
        assert not part or part in anchors(target), f"{target} has no heading #{part}"
    for named in re.findall(r"`((?:notebooks|tests|genai|conf|docs|benchmarks)/[\w/.]+)`", path.read_text()):
        assert (ROOT / named).exists(), named
    for alt, picture in re.findall(r"!\[(.*?)\]\((\S+)\)", path.read_text()):
        assert len(alt) > 15, f"{picture} needs a text for those who do not see it"


def test_the_site_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/]+\.md", text[text.index("nav:") :]))
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    for path in (DOCS / "api").glob("*.md"):
        for module in re.findall(r"^::: (\S+)", path.read_text(), re.MULTILINE):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").exists() or (place / "__init__.py").exists(), module


QUESTIONS = {  # of a new user, and a line of the page that answers each
    "where do I change the noise schedule": "model.schedule._target_=genai.models.diffusion.process.schedules.linear",
    "where do I add my loss": "model.weighting._target_=my_lab.losses",
    "where do I add my data": "data=ring",
}


@pytest.mark.parametrize("start", [README, DOCS / "index.md"], ids=name)
@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_of_a_new_user_are_answered_within_three_clicks(start, question):
    clicks, queue = {start: 0}, collections.deque([start])
    while queue:
        page = queue.popleft()
        for target, _ in links(page):
            if target.suffix == ".md" and target not in clicks:
                clicks[target] = clicks[page] + 1
                queue.append(target)
    answers = [
        n
        for page, n in clicks.items()
        if any(QUESTIONS[question] in b.text for b in blocks(page) if b.language == "bash")
    ]
    assert answers and min(answers) <= 3


def test_no_page_installs_another_projects_genai():
    for path in [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "conf").rglob("*.yaml")]:
        assert not re.search(r"pip install \"?genai(?!-lab)\b", path.read_text()), path


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs"), pytest.importorskip("material"), pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in [*tmp_path.glob("*.html"), *tmp_path.glob("recipes/*.html")]:
        loaded = re.findall(
            r'<(?:script|img)[^>]+src="?(https?:[^" >]+)|<link[^>]+rel="?stylesheet"?[^>]+href="?(https?:[^" >]+)',
            page.read_text(),
        )
        assert not loaded, f"{page.name} loads {loaded}"
