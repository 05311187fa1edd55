"""GPT-2 as it is published: from its files to Hugging Face's text, by the script of the recipe."""

import json
import shutil

import pytest
import torch

import genai
from genai.checkpoint import gpt2
from genai.core.errors import UserError
from tests.modalities.test_published import END, TEXT, words
from tests.pages import DOCS, blocks

transformers = pytest.importorskip("transformers")
PROMPTS = ["The meaning of life", " isn't", "Zoë wrote: 東京", "42'S, it's"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small GPT-2 with random weights, so large that its text varies, and its checkpoint of ours."""
    root = tmp_path_factory.mktemp("gpt2")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), eos_token=END)
    tokenizer.save_pretrained(root / "gpt2")
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
    config = transformers.GPT2Config(vocab_size=320, eos_token_id=319, bos_token_id=319, **sizes)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight[319] *= 1.5  # so that some texts end
    model.save_pretrained(root / "gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("sys.argv", ["import_gpt2.py", "gpt2"])
        (script,) = (block.text for block in blocks(DOCS / "recipes" / "gpt2.md") if block.title)
        exec(compile(script, "import_gpt2.py", "exec"), {})
    return root


def test_greedy_text_is_that_of_hugging_face_token_by_token(folder):
    """Alone, and in a batch of prompts of several lengths; it ends where theirs does."""
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder / "gpt2").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "gpt2")
    ours = genai.load(folder / "runs" / "gpt2" / "last.ckpt")
    batch = genai.sample(ours, n=4, prompt=PROMPTS, max_new_tokens=50, temperature=0, stop=END)
    shown, ended = genai.texts(ours, batch), 0
    for b, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = theirs.generate(ids, max_new_tokens=50, do_sample=False, pad_token_id=319)[0, ids.shape[1] :].tolist()
        kept = new[:-1] if new[-1] == 319 else new
        ended += kept is not new
        assert len({*new}) > 5, "a text that repeats itself proves little"
        assert batch["tokens"][b, : batch["length"][b]].tolist() == kept and shown[b] == tokenizer.decode(kept)
        alone = genai.sample(ours, n=1, prompt=prompt, max_new_tokens=50, temperature=0, stop=END)
        assert genai.texts(ours, alone) == [shown[b]]
    assert 0 < ended < 4
    ids = tokenizer(TEXT[:40], return_tensors="pt")["input_ids"]
    assert ours.modality.tokenizer.encode(TEXT[:40]).tolist() == ids[0].tolist()
    with torch.no_grad():
        assert torch.allclose(ours.model.net(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_are_banned_as_hugging_face_bans_them(folder, n):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder / "gpt2").eval()
    ours = genai.load(folder / "runs" / "gpt2" / "last.ckpt")
    given = {"max_new_tokens": 40, "no_repeat_ngram": n, "temperature": 0}
    batch = genai.sample(ours, n=4, prompt=PROMPTS, **given)
    free = genai.sample(ours, n=4, prompt=PROMPTS, max_new_tokens=40, temperature=0)["tokens"]
    assert not torch.equal(free, batch["tokens"])
    for prompt, row in zip(PROMPTS, batch["tokens"], strict=True):
        ids = torch.from_numpy(ours.modality.tokenizer.encode(prompt))[None]
        options = {"do_sample": False, "no_repeat_ngram_size": n, "eos_token_id": None, "pad_token_id": 319}
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, **options)
        assert new[0, ids.shape[1] :].tolist() == row.tolist()


def test_a_run_begins_with_published_weights(folder, monkeypatch):
    """On a text of one's own with the same tokenizer; the pickled layout has the same weights."""
    from genai.cli import compose_config, prepare_training
    from genai.train.run import run

    monkeypatch.chdir(folder)
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 200)
    given = [
        "init_from=runs/gpt2/last.ckpt",
        "data=text_file",
        "data.path=book.txt",
        "data.tokenizer=gpt2",
        "debug=true",
    ]
    out = run(compose_config("train", [*given, "optim.lr=1e-9", "run_dir=tuned", "data.cache=cache"], prepare_training))
    tuned, values = genai.load(out).model.state_dict(), gpt2.read("gpt2")[1]
    assert all(torch.allclose(tuned[name], values[name], atol=1e-5) for name in values)
    shutil.copytree("gpt2", "pickled")
    weights = transformers.GPT2LMHeadModel.from_pretrained("gpt2").state_dict()
    torch.save(weights, "pickled/pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    assert all(torch.equal(gpt2.read("pickled")[1][name], values[name]) for name in values)


WRONG = {
    "no config": "config.json cannot be read",
    "no sizes": "config.json does not say n_positions, vocab_size, n_embd, n_layer, n_head: name the folder of a published GPT-2",
    "relu": "config.json says activation_function='relu', and a GPT-2 has 'gelu_new': it is another model",
    "inner": "config.json says n_inner=64, and a GPT-2 has None: it is another model",
    "bert": "config.json says model_type='bert'",
    "no weights": "has neither model.safetensors nor pytorch_model.bin",
    "torn": "model.safetensors cannot be read",
    "no pickle": "pytorch_model.bin cannot be read",
    "other": "are not those of a GPT-2, because of",
}


@pytest.mark.parametrize("case", WRONG)
def test_folders_that_are_no_gpt2(folder, tmp_path, case):
    path = tmp_path / "gpt2"
    shutil.copytree(folder / "gpt2", path)
    config = json.loads((path / "config.json").read_text())
    changes = {"relu": {"activation_function": "relu"}, "inner": {"n_inner": 64}, "bert": {"model_type": "bert"}}
    (path / "config.json").write_text(
        json.dumps({**config, **changes.get(case, {}), **({"n_head": None} if case == "no sizes" else {})})
    )
    weights = path / "model.safetensors"
    if case == "no config":
        (path / "config.json").unlink()
    if case in ("no weights", "no pickle"):
        weights.unlink()
    if case == "torn":
        weights.write_bytes(weights.read_bytes()[:5000])
    if case == "no pickle":
        (path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    if case == "other":
        weights.unlink()
        torch.save({"h.0.attn.rotary.weight": torch.ones(1)}, path / "pytorch_model.bin")
    with pytest.raises(UserError) as refused:
        gpt2.read(path)
    assert WRONG[case] in str(refused.value) and "\n" not in str(refused.value)
