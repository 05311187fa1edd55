"""The autoregressive family: the network against its definition and GPT-2's, the cache, the draws."""

import contextlib
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from genai.checkpoint import gpt2
from genai.core import rng
from genai.core.errors import UserError
from genai.models.autoregressive import decode, speculative
from genai.models.autoregressive.gpt import GPT
from genai.models.autoregressive.likelihood import nats_of
from genai.nn import norm, transformer
from genai.nn.attention import Attention, LearnedPositions, PeriodicPositions, RotaryPositions, rotate
from genai.nn.cache import Cache, Positions
from genai.nn.token_transformer import TokenTransformer
from genai.nn.transformer import MLP, SwiGLU, Transformer
from genai.train.gradients import ParameterGroup
from genai.train.lit import LitModel

V = 13
MLPS = {
    "gelu": partial(MLP, activation=transformer.GELU(), bias=True),
    "squared_relu": partial(MLP, activation=transformer.SquaredReLU()),
    "swiglu": SwiGLU,
}


def gpt(
    heads=4,
    kv_heads=None,
    qk_norm=None,
    position="rotary",
    mlp="squared_relu",
    normal="rms",
    bias=False,
    tied=False,
    shift=False,
    width=16,
    layers=2,
    length=24,
    init=transformer.scaled_init,
    seed=0,
):
    torch.manual_seed(seed)
    net = Transformer(
        width,
        layers,
        attention=partial(Attention, heads=heads, kv_heads=kv_heads, bias=bias, qk_norm=qk_norm and norm.RMSNorm),
        mlp=MLPS[mlp],
        norm=partial(norm.RMSNorm, gain=True) if normal == "rms" else norm.LayerNorm,
        position={
            "rotary": RotaryPositions,
            "periodic": partial(PeriodicPositions, period=6),
            "learned": partial(LearnedPositions, length=length),
        }[position],
        shift=transformer.Shift if shift else None,
    )
    model = GPT("tokens", V, length, TokenTransformer(V, net, tied, init))
    with torch.no_grad():  # so that attention and logits are far from uniform
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return model.eval()


OPTIONS = [
    {},
    {"kv_heads": 1},
    {"kv_heads": 2, "qk_norm": True},
    {"qk_norm": True, "position": "learned"},
    {"position": "learned", "mlp": "gelu", "normal": "layer", "bias": True, "tied": True},
    {"mlp": "swiglu"},
    {"shift": True, "qk_norm": True},
    {"shift": True, "position": "periodic"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_changes_nothing(options, batch):
    """Whatever is read at once and whatever one by one, logits are those of the whole text."""
    model, tokens = gpt(**options).double(), torch.randint(0, V, (batch, 20))
    with torch.no_grad():
        whole = model.net(tokens)
        for cuts in ([5, 6, 7, 8, 20], [1, 2, 12, 13, 20], [20]):
            cache, first, parts = Cache(model.net.transformer, batch, 20, 20), 0, []
            for last in cuts:
                parts.append(model.net(tokens[:, first:last], cache))
                first = last
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prompts_padded_on_the_left_are_read_as_if_alone(options):
    model = gpt(**options)
    rows = [torch.randint(1, V, (n,)) for n in (3, 9, 6)]
    pad = torch.tensor([9 - len(row) for row in rows])
    tokens = torch.stack([torch.cat([torch.zeros(9 - len(row), dtype=torch.int64), row]) for row in rows])
    more = torch.randint(0, V, (3, 5))
    with torch.no_grad():
        cache = Cache(model.net.transformer, 3, 14, 14, pad)
        together = [model.net(tokens, cache)[:, -1], *(model.net(more[:, i : i + 1], cache)[:, -1] for i in range(5))]
        for b, row in enumerate(rows):
            alone = model.net(torch.cat([row, more[b]])[None])[0, len(row) - 1 :]
            assert torch.allclose(torch.stack(together)[:, b], alone, atol=1e-4, rtol=1e-5)


def test_causality_by_autograd():
    for options in OPTIONS:
        model = gpt(**options)
        x = torch.randn(1, 10, 16, requires_grad=True)
        y = model.net.transformer(x)
        for t in range(10):
            (grad,) = torch.autograd.grad(y[0, t, 0], x, retain_graph=True)
            assert (grad[0, t + 1 :] == 0).all() and (grad[0, : t + 1].abs().amax(-1) > 0).all(), options


def test_attention_is_its_definition():
    """softmax(q k / sqrt(D)) v, head by head, with grouped keys, and the weights that are shown."""
    torch.manual_seed(0)
    attention = Attention(16, heads=4, kv_heads=2, qk_norm=norm.RMSNorm).double()
    x, rotation = torch.randn(2, 7, 16).double(), RotaryPositions(16)(torch.arange(7), 4)[1]
    q, k, v = attention.heads_of(x, rotation)
    heads = []
    for h in range(4):
        scores = q[:, h] @ k[:, h // 2].mT / 2
        scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, h // 2])
        assert torch.allclose(scores.softmax(-1), attention.weights(x, rotation)[:, h])
    assert torch.allclose(attention(x, rotation), attention.out(torch.cat(heads, -1)))


def test_periodic_positions_know_the_place_and_the_distance():
    made = PeriodicPositions(8, period=6)
    places, rotation = made(torch.arange(20), 8)
    assert torch.equal(places[3], places[15]) and not torch.equal(places[3], places[4])
    assert all(map(torch.equal, rotation, RotaryPositions(8)(torch.arange(20), 8)[1]))


def test_rotary_positions_turn_pairs_and_know_only_distances():
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    _, (cos, sin) = RotaryPositions(8)(torch.arange(50), 8)
    assert torch.allclose(cos[3, 0, 1].double(), torch.tensor(3 * 10000 ** (-2 / 8)).cos().double(), atol=1e-6)
    q, k = (rotate(t.expand(1, 50, 1, 8), (cos.double(), sin.double()))[0, :, 0] for t in (q, k))
    scores = q @ k.T
    for distance in (0, 1, 17):
        line = scores.diagonal(-distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-5)


def test_logits_and_loss_equal_public_gpt2():
    """Hugging Face's GPT-2 with random weights, copied over; its linear maps are stored transposed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=3, n_head=4, initializer_range=0.3)
    ).eval()
    net = Transformer(
        24,
        3,
        attention=partial(Attention, heads=4, bias=True),
        norm=norm.LayerNorm,
        position=partial(LearnedPositions, length=32),
        mlp=partial(MLP, activation=transformer.GELU("tanh"), bias=True),
    )
    ours = GPT("tokens", 50, 32, TokenTransformer(50, net, tied=True)).eval()
    ours.load_state_dict(gpt2.convert_names(theirs.state_dict()))
    tokens = torch.randint(0, 50, (2, 33))
    with torch.no_grad():
        expected = theirs(tokens[:, :-1]).logits
        assert torch.allclose(ours.net(tokens[:, :-1]), expected, atol=1e-4, rtol=0)
        loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
        assert torch.allclose(ours({"tokens": tokens}, 0).total, loss, atol=1e-5)


def test_initial_weights():
    net = gpt(init=transformer.zero_init).net
    x = torch.randn(1, 5, 16)
    assert torch.equal(net.transformer(x), net.transformer.norm(x))  # blocks begin as identities
    for tied in (False, True):
        torch.manual_seed(0)
        wide = TokenTransformer(
            V,
            Transformer(128, 1, partial(Attention, heads=4), SwiGLU, norm.RMSNorm, RotaryPositions),
            tied,
            transformer.zero_init,
        )
        logits = wide(torch.randint(0, V, (4, 20)))
        assert 0.01 < logits.std() < 2 and logits.abs().max() < 4, tied
    torch.manual_seed(0)
    deep = Transformer(
        64, 8, attention=partial(Attention, heads=4), mlp=MLPS["gelu"], norm=norm.LayerNorm, position=RotaryPositions
    )
    transformer.scaled_init(deep)
    assert deep.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert deep.blocks[3].mlp.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for again in (False, True):
        model = gpt().train()
        model.net.transformer.gradient_checkpointing = again
        model({"tokens": torch.arange(24).view(2, 12) % V}, 0).total.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_loss_counts_only_what_the_mask_marks():
    model, tokens = gpt(), torch.randint(0, V, (2, 9))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3], mask[1, 5:] = True, True
    loss = model({"tokens": tokens, "mask": mask}, 0)
    nats = -model.net(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert loss.weight == 5
    assert torch.allclose(loss.total, (nats[0, 2] + nats[1, 4:].sum()) / 5)
    assert torch.allclose(
        model.log_prob({"tokens": tokens, "mask": mask}, 0), -torch.stack([nats[0, 2], nats[1, 4:].sum()])
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_documents_apart_are_each_computed_alone(options):
    """With documents of one token and of many, and one that a window cuts; their gradients are those of the sum."""
    model, end = gpt(**options).double(), V - 1
    tokens = torch.randint(0, V - 1, (3, 22), generator=torch.Generator().manual_seed(1))
    for row, ends in enumerate([(4, 5, 12, 21), (0, 20), ()]):
        tokens[row, list(ends)] = end
    batch = {"tokens": tokens, "document": (tokens == end).cumsum(1)}
    nats = model.nats(batch)
    alone = []
    for row in tokens:
        starts = sorted({0, *(row[:-1] == end).nonzero()[:, 0].tolist()})
        for a, b in zip(starts, [*starts[1:], len(row) - 1], strict=True):
            alone.append(model.nats({"tokens": row[None, a : b + 1]})[0])
    assert torch.allclose(nats.flatten(), torch.cat(alone), atol=1e-10)
    mixed = model.nats({"tokens": tokens})
    assert torch.allclose(mixed[2], nats[2]) and not torch.allclose(mixed[0, 6:], nats[0, 6:], atol=1e-3)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(model(batch, 0).total, weights, allow_unused=True)
    theirs = torch.autograd.grad(torch.cat(alone).mean(), weights, allow_unused=True)
    assert all(a is None or torch.allclose(a, b, atol=1e-9) for a, b in zip(ours, theirs, strict=True))


def test_a_model_that_cannot_keep_documents_apart_says_so():
    with pytest.raises(
        UserError, match=r"data.separate=true is for a model that keeps documents apart, such as model=gpt"
    ):
        nats_of(torch.zeros(1, 2, V), {"tokens": torch.zeros(1, 3, dtype=torch.int64), "document": torch.zeros(1, 3)})


def test_a_batch_without_targets_weighs_nothing():
    """Its loss and its gradient are 0, and so are those of a step of nothing else."""
    model = gpt().train()
    masked = {"tokens": torch.randint(0, V, (2, 9)), "mask": torch.zeros(2, 9, dtype=torch.bool)}
    loss = model(masked, 0)
    assert loss.weight == 0 and loss.total.item() == 0
    loss.total.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    lit = SimpleNamespace(
        trainer=SimpleNamespace(world_size=1),
        seed=0,
        global_rank=0,
        device=torch.device("cpu"),
        overlaps=True,
        no_sync=contextlib.nullcontext,
        manual_backward=lambda total: total.backward(),
    )
    group = ParameterGroup(model.named_parameters())
    losses = LitModel.accumulate_gradients(lit, group, [masked, masked], lambda b: model(b, 0), 0)
    assert len(losses) == 2 and all((p.grad == 0).all() for p in model.parameters())


# Decoding


def plain(model, prompt, seed, n, window=None, **shape):
    """The definition: read the whole text anew for each token, without a cache."""
    u = rng.uniform(torch.tensor([seed]), (n,), stream=rng.TOKENS)
    text = prompt.clone()
    for i in range(n):
        with torch.no_grad():
            logits = model.net(text[None, -window:] if window else text[None])[0, -1:].float()
        p = decode.distribution(logits, **shape)
        text = torch.cat([text, decode.draw(p, u[:, i : i + 1])[0]])
    return text[len(prompt) :]


SHAPES = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 1.3}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_generation_is_its_definition_and_depends_on_the_seed_alone(shape, position):
    """Batched, padded, streamed and cached, in float64: the tokens of each seed are those of the plain loop."""
    model = gpt(position=position, qk_norm=True, shift=position == "rotary").double()
    rows = [torch.randint(1, V, (n,)) for n in (2, 7, 4, 7)]
    pad = torch.tensor([7 - len(row) for row in rows])
    tokens = torch.stack([torch.cat([torch.zeros(7 - len(row), dtype=torch.int64), row]) for row in rows])
    seen = []
    batch = decode.generate(
        model,
        torch.arange(4) + 5,
        {"tokens": tokens, "pad": pad},
        lambda i, n, s: seen.append(s["tokens"].clone()),
        max_new_tokens=17,
        **shape,
    )
    for b, row in enumerate(rows):
        assert batch["tokens"][b].tolist() == plain(model, row, 5 + b, 17, **shape).tolist()
    assert len(seen) == 17 and all(torch.equal(s, batch["tokens"][:, : i + 1]) for i, s in enumerate(seen))
    whole = torch.cat([rows[1], batch["tokens"][1]])
    nats = model.nats({"tokens": whole[None]})[0, 6:]
    assert torch.allclose(batch["log_prob"][1].double(), -nats.double(), atol=1e-5)


def test_tokens_of_a_seed_do_not_depend_on_the_batch():
    model = gpt(qk_norm=True)
    whole = decode.generate(model, torch.arange(1000), max_new_tokens=12)["tokens"]
    parts = torch.cat([decode.generate(model, s, max_new_tokens=12)["tokens"] for s in torch.arange(1000).split(37)])
    assert (whole == parts).all(1).float().mean() >= 0.99


def test_greedy_takes_the_likeliest_and_repetition_is_penalised():
    model = gpt()
    one = decode.generate(model, torch.tensor([1, 2]), max_new_tokens=15, temperature=0)["tokens"]
    assert torch.equal(one[0], one[1])
    text = torch.cat([torch.zeros(1, dtype=torch.int64), one[0]])
    assert torch.equal(model.net(text[None])[0, :-1].argmax(-1), one[0])
    many = decode.generate(model, torch.tensor([1]), max_new_tokens=11, temperature=0, repetition_penalty=1e6)[
        "tokens"
    ][0]
    assert len(set(many.tolist())) == 11  # while there are others, none comes twice


@pytest.mark.parametrize("prompt", [[], [4, 7]], ids=str)
def test_the_penalty_is_of_the_prompt_and_what_was_written(prompt):
    """Not of the end token that begins a document: greedy, against the loop that says so."""
    penalty, ends = 1.5, 0
    for seed in range(6):
        model, text, seen = gpt(seed=seed), [0, *prompt], {*prompt}
        cond = {"tokens": torch.tensor([[0, 0, *text]]), "pad": torch.tensor([2]), "lead": torch.tensor([1])}
        batch = decode.generate(
            model,
            torch.arange(1),
            cond if prompt else None,
            max_new_tokens=12,
            temperature=0,
            repetition_penalty=penalty,
        )
        for _ in range(12):
            with torch.no_grad():
                logits = model.net(torch.tensor([text]))[0, -1]
            for v in seen:
                logits[v] = logits[v] / penalty if logits[v] > 0 else logits[v] * penalty
            text.append(int(logits.argmax()))
            seen.add(text[-1])
        assert batch["tokens"][0].tolist() == text[1 + len(prompt) :]
        ends += 0 in text[1:]
    assert ends > 0


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 40])
def test_no_ngram_occurs_twice(n, temperature):
    """In a padded batch, against the loop that says so; when all tokens of a vocabulary would repeat, none is banned."""
    model, rows, repeats = gpt(tied=True), [[4, 7, 4, 7, 4], [2], [5, 5, 5]], 0
    cond = {"tokens": torch.tensor([[0] * (6 - len(row)) + row for row in rows]), "pad": torch.tensor([1, 5, 3])}
    cond = {**cond, "tokens": torch.cat([cond["tokens"][:, :1], cond["tokens"]], 1), "lead": torch.tensor([1, 1, 1])}
    given = {"max_new_tokens": 17, "temperature": temperature}
    batch = decode.generate(model, torch.arange(3), cond, no_repeat_ngram=n, **given)
    free = decode.generate(model, torch.arange(3), cond, **given)
    u = rng.uniform(torch.arange(3), (17,), stream=rng.TOKENS)
    for b, own in enumerate(rows):
        text = [*own]
        for i in range(17):
            with torch.no_grad():
                logits = model.net(torch.tensor([[0, *text]]))[0, -1]
            grams = {tuple(text[j : j + n]) for j in range(len(text) - n + 1)}
            banned = [v for v in range(V) if (*text[len(text) - n + 1 :], v)[-n:] in grams and len(text) >= n - 1]
            if len(banned) < V:
                logits[banned] = -math.inf
            p = decode.distribution(logits[None], temperature or 1)
            text.append(int(logits.argmax()) if temperature == 0 else decode.draw(p, u[b : b + 1, i : i + 1]).item())
        assert batch["tokens"][b].tolist() == text[len(own) :]
        whole = [0, *text]
        logs = model.net(torch.tensor([whole[:-1]]))[0, len(own) :].log_softmax(-1)
        assert torch.allclose(
            batch["log_prob"][b], logs.gather(1, torch.tensor(text[len(own) :])[:, None])[:, 0], atol=1e-4
        )
        repeats += free["tokens"][b].tolist() != text[len(own) :]
    assert (repeats > 0) == (n < 40)


def test_samples_are_ordinary_tensors():
    """What a sampler returns or shows can be used where gradients are computed."""
    model, seen = gpt(), []
    draft, prompt = gpt(layers=1), {"tokens": torch.tensor([[1, 2], [3, 4]])}
    batches = [
        sampler(model, torch.arange(2), prompt, lambda i, n, state: seen.append(state), max_new_tokens=4)
        for sampler in (decode.generate, partial(speculative.speculative, draft=draft))
    ]
    assert not any(value.is_inference() for batch in [*batches, *seen] for value in batch.values())
    for batch in batches:
        model({"tokens": batch["tokens"]}, 0).total.backward()


def test_stop_tokens_end_a_sample_and_save_the_rest():
    model, calls = gpt(), []
    cond = {"tokens": torch.tensor([[1], [2], [3]]), "stop": torch.tensor([4, 4, 4])}
    batch = decode.generate(model, torch.arange(3), cond, lambda i, n, s: calls.append(i), max_new_tokens=500)
    free = decode.generate(model, torch.arange(3), {"tokens": cond["tokens"]}, max_new_tokens=500)
    for b, length in enumerate(batch["length"].tolist()):
        assert (batch["tokens"][b, :length] != 4).all() and (batch["tokens"][b, length:] == 4).all()
        assert torch.equal(batch["tokens"][b, :length], free["tokens"][b, :length])
        assert (batch["log_prob"][b, length + 1 :] == 0).all() and batch["log_prob"][b, length] < 0
    assert batch["length"].max() < len(calls) <= batch["length"].max() + decode.CHECK_STOP_EVERY


def test_the_first_token_of_a_vocabulary_can_end_a_sample_too():
    """Tokens still to come are no zeros that somebody wrote."""
    model, stop = gpt(length=200), torch.tensor([0])
    for seed in torch.arange(40).split(1):
        free = decode.generate(model, seed, max_new_tokens=100)["tokens"][0].tolist()
        if 0 not in free[: decode.CHECK_STOP_EVERY]:
            break
    cond = {"tokens": torch.zeros(1, 1, dtype=torch.int64), "stop": stop}
    batch = decode.generate(model, seed, cond, max_new_tokens=100)
    length = free.index(0) if 0 in free else 100
    assert length > decode.CHECK_STOP_EVERY and batch["length"].item() == length
    assert batch["tokens"][0, :length].tolist() == free[:length]


@pytest.mark.parametrize("lengths", [(3, 6), (2, 29), (21, 9)])
@pytest.mark.parametrize("shift", [False, True])
def test_past_the_context_by_a_sliding_cache(capsys, shift, lengths):
    """Rotary: equal to attention in which every position sees the last `length` alone, in any batch."""
    model = gpt(length=8, qk_norm=True, shift=shift).double()
    rows = [torch.randint(1, V, (n,)) for n in lengths]
    pad = torch.tensor([max(lengths) - n for n in lengths])
    tokens = torch.stack([F.pad(row, (n, 0)) for row, n in zip(rows, pad.tolist(), strict=True)])
    cond = {"tokens": tokens, "pad": pad}
    batch = decode.generate(model, torch.arange(2), cond, max_new_tokens=30 if max(lengths) < 8 else 11)
    assert "past the 8 tokens" in capsys.readouterr().err
    for b, row in enumerate(rows):
        text = torch.cat([row, batch["tokens"][b]])
        t, n = len(text) - 1, batch["tokens"].shape[1]
        band = torch.ones(t, t, dtype=torch.bool).tril().triu(-7)[None, None]
        net = model.net.transformer
        with torch.no_grad():
            x, rotation = model.net.embed(text[None, :-1]), net.position(torch.arange(t), net.head_dim)[1]
            for block in net.blocks:
                x = block(x, Positions(None, rotation, band))
            logits = model.net.head(net.norm(x))[0, len(row) - 1 :]
        u = rng.uniform(torch.tensor([b]), (n,), stream=rng.TOKENS)[0][:, None]
        assert torch.equal(decode.draw(logits.float().softmax(-1), u)[:, 0], batch["tokens"][b])


@pytest.mark.parametrize("lengths", [(3, 6), (3, 19), (8, 7), (12, 9)])
def test_past_the_context_with_learned_positions_the_window_is_encoded_again(capsys, lengths):
    model = gpt(length=8, position="learned").double()
    rows = [torch.randint(1, V, (n,)) for n in lengths]
    pad = torch.tensor([max(lengths) - n for n in lengths])
    tokens = torch.stack([F.pad(row, (n, 0)) for row, n in zip(rows, pad.tolist(), strict=True)])
    cond = {"tokens": tokens, "pad": pad}
    batch = decode.generate(model, torch.arange(2), cond, max_new_tokens=20)
    assert "encoded again" in capsys.readouterr().err
    for b, row in enumerate(rows):
        assert torch.equal(batch["tokens"][b], plain(model, row, b, 20, window=8))


def replay_of(trajectory, inputs):
    """In the place of a CUDA graph: the operations of one call, recorded, and run again on the same memory. The host's
    part is not run again, so a number it counts or a shape it grows would show. Recording runs the call, replays do not
    repeat that."""
    done = []
    graph = make_fx(lambda inputs: done.append(trajectory(inputs)) or done[0])(inputs)
    return lambda inputs: done.pop().clone() if done else graph(inputs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("given", "n"), [(7, 12), (7, 40), (30, 9)])
def test_a_step_is_the_same_work_whatever_the_position(options, given, n, monkeypatch):
    """The second step is recorded, the others replay it; past the context too. Tokens are those of ordinary steps."""
    if given + n > 25 and options.get("position") == "learned":
        pytest.skip("past its context a text is read anew, without a graph")
    model = gpt(**options).double()
    cond = {"tokens": torch.randint(1, V, (3, given)), "pad": torch.tensor([0, 5, 2]), "stop": torch.tensor([V, 2, V])}
    arguments = {"max_new_tokens": n, "top_k": 8, "temperature": 0.9, "repetition_penalty": 1.1, "no_repeat_ngram": 2}
    expected = decode.generate(model, torch.arange(3), cond, **arguments)
    monkeypatch.setattr(decode, "_uses_graph", lambda _, writer: writer.model.fix(writer.state))
    monkeypatch.setattr(decode, "capture", replay_of)
    read, calls = [], []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    got = decode.generate(model, torch.arange(3), cond, lambda i, n, s: read.append(s["tokens"].clone()), **arguments)
    assert len(calls) == 3 + (given > 24)  # the prompt, the step that warms up, the step that is recorded
    assert torch.equal(got["tokens"], expected["tokens"])
    assert torch.allclose(got["log_prob"], expected["log_prob"], atol=1e-6)
    assert len(read) == n and torch.equal(read[-1][0], got["tokens"][0])


def test_a_graph_that_cannot_be_says_why(monkeypatch):
    with pytest.warns(UserWarning, match="step by step, not as a CUDA graph: the model is on cpu"):
        plain_ = decode.generate(gpt(), torch.arange(2), max_new_tokens=5, cuda_graph=True)["tokens"]

    def capture(trajectory, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(decode, "_uses_graph", lambda _, writer: writer.model.fix(writer.state))
    monkeypatch.setattr(decode, "capture", capture)
    with pytest.warns(UserWarning, match="not as a CUDA graph: operation not permitted when stream is capturing$"):
        assert torch.equal(decode.generate(gpt(), torch.arange(2), max_new_tokens=5)["tokens"], plain_)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_cuda_graph_writes_the_tokens_of_its_steps(options):
    model = gpt(**options).cuda()
    cond = {"tokens": torch.randint(1, V, (3, 7)), "pad": torch.tensor([0, 5, 2])}
    graphed, stepped = (
        decode.generate(model, torch.arange(3), cond, max_new_tokens=17, top_k=8, cuda_graph=graph)
        for graph in (None, False)
    )
    assert torch.equal(graphed["tokens"], stepped["tokens"])
    assert torch.allclose(graphed["log_prob"], stepped["log_prob"], atol=1e-4)


def test_distribution_cuts():
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.07, 0.03]]).log()

    def kept(**shape):
        p = decode.distribution(logits, **shape)
        assert torch.allclose(p[p > 0], logits.exp()[p > 0] / logits.exp()[p > 0].sum())
        return (p > 0).sum().item()

    assert [kept(top_k=k) for k in (2, 4, 99)] == [2, 4, 5]
    assert [kept(top_p=p) for p in (0.45, 0.55, 0.79, 0.85, 1.0)] == [1, 2, 2, 3, 5]
    assert [kept(min_p=p) for p in (0.5, 0.19, 0.0)] == [2, 3, 5]
    assert kept(top_k=3, top_p=0.85) == 2  # of 0.556, 0.333, 0.111
    hot = decode.distribution(logits, temperature=2.0)
    assert torch.allclose(hot, logits.exp().sqrt() / logits.exp().sqrt().sum())


def test_the_inverse_cdf_never_takes_what_cannot_be():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    u = torch.tensor([[0.0, 1e-9, 0.2499, 0.2501, 0.9999999, 1.0]])
    assert decode.draw(p, u).tolist() == [[1, 1, 1, 3, 3, 3]]


def chi_square(tokens, p):
    """Sum of (seen - expected)^2 / expected, and its degrees of freedom."""
    expected = p.double() * len(tokens)
    seen = torch.bincount(tokens, minlength=len(p)).double()
    possible = expected > 0
    assert seen[~possible].sum() == 0
    return ((seen - expected)[possible] ** 2 / expected[possible]).sum().item(), int(possible.sum()) - 1


@pytest.mark.parametrize("shape", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2, "temperature": 0.8}], ids=str)
def test_speculative_verification_keeps_the_target_distribution(shape):
    """100,000 draws: a draft proposes, the target accepts or corrects; the result has the target's distribution."""
    from scipy.stats import chi2

    torch.manual_seed(0)
    p, q = (decode.distribution(torch.randn(1, V), **shape) for _ in range(2))
    n = 100_000
    u = rng.uniform(torch.arange(n), (5,), stream=rng.TOKENS)
    drafted = decode.draw(q.expand(n, V), u[:, :1])
    kept, token = speculative.verify(p.expand(n, 2, V), q.expand(n, 1, V), drafted, u[:, 1:3], u[:, 3:5])
    out = torch.where(kept == 1, drafted[:, 0], token[:, 0])
    statistic, freedom = chi_square(out, p[0])
    assert statistic < chi2.ppf(0.999, freedom)


def test_speculative_decoding_writes_what_the_model_would():
    """Texts of three tokens have the model's joint distribution, and the model is called less often."""
    from scipy.stats import chi2

    model, draft = gpt(width=8, heads=2, shift=True), gpt(width=8, heads=2, layers=1, seed=1)
    prompt, n = torch.tensor([[3, 1]]), 600
    cond = {"tokens": prompt.expand(n, 2)}
    batch = speculative.speculative(model, torch.arange(n), cond, draft=draft, ahead=2, max_new_tokens=3, top_k=4)
    with torch.no_grad():
        first = decode.distribution(model.net(prompt)[:, -1], top_k=4)[0]
        joint = torch.zeros(V, V)
        for a in range(V):
            joint[a] = first[a] * decode.distribution(model.net(torch.tensor([[3, 1, a]]))[:, -1], top_k=4)[0]
    statistic, freedom = chi_square(batch["tokens"][:, 0] * V + batch["tokens"][:, 1], joint.flatten())
    assert statistic < chi2.ppf(0.999, freedom)
    whole = torch.cat([prompt[0], batch["tokens"][7]])
    assert torch.allclose(batch["log_prob"][7], -model.nats({"tokens": whole[None]})[0, 1:], atol=1e-4)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_speculative_decoding_fills_the_context_and_reads_padding_and_stops(position):
    model, draft = gpt(position=position), gpt(position=position, layers=1, seed=1)
    rows = [torch.randint(1, V, (n,)) for n in (2, 5)]
    tokens = torch.stack([F.pad(row, (5 - len(row), 0)) for row in rows])
    cond = {"tokens": tokens, "pad": torch.tensor([3, 0]), "stop": torch.tensor([4, V])}
    batch = speculative.speculative(model, torch.arange(2), cond, draft=draft)
    assert batch["tokens"].shape == (2, 20)  # 24, of which the last is not read
    for b, row in enumerate(rows):
        n = min(int(batch["length"][b]) + 1, 20)
        nats = model.nats({"tokens": torch.cat([row, batch["tokens"][b, :n]])[None]})[0, len(row) - 1 :]
        assert torch.allclose(batch["log_prob"][b, :n], -nats, atol=1e-4)
    assert (batch["tokens"][0, int(batch["length"][0]) :] == 4).all()


@pytest.mark.parametrize("given", [3, 20])
def test_speculative_decoding_past_the_context_writes_what_generate_does(given):
    """The likeliest token each time, of a model and a draft with contexts of their own."""
    model, draft = gpt(length=8, shift=True), gpt(length=6, layers=1, seed=1)
    cond = {"tokens": torch.randint(0, V, (2, given))}
    expected = decode.generate(model, torch.arange(2), cond, max_new_tokens=20, top_k=1)
    got = speculative.speculative(model, torch.arange(2), cond, draft=draft, max_new_tokens=20, top_k=1)
    assert torch.equal(got["tokens"], expected["tokens"])
    assert torch.allclose(got["log_prob"], expected["log_prob"], atol=1e-4)


def test_a_perfect_draft_is_always_believed():
    model = gpt()
    calls = []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    draft = gpt()
    speculative.speculative(model, torch.tensor([0]), draft=draft, ahead=4, max_new_tokens=20)
    assert len(calls) == 4  # five tokens a call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "sampler.temperature=-1"),
        ({"top_k": 0}, "sampler.top_k=0"),
        ({"top_p": 0}, "sampler.top_p=0 must be a number greater than 0 and at most 1"),
        ({"top_p": 1.5}, "sampler.top_p=1.5"),
        ({"min_p": 2}, "sampler.min_p=2"),
        ({"repetition_penalty": 0}, "sampler.repetition_penalty=0"),
        ({"no_repeat_ngram": 0}, "sampler.no_repeat_ngram=0 must be a whole number, at least 1"),
        ({"max_new_tokens": 0}, "sampler.max_new_tokens=0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        decode.generate(gpt(), torch.tensor([0]), **arguments)


def test_wrong_drafts_and_networks():
    with pytest.raises(UserError, match="must be the run or checkpoint of a smaller model"):
        speculative.speculative(gpt(), torch.tensor([0]))
    long = {"tokens": torch.zeros(1, 20, dtype=torch.int64)}
    with pytest.raises(UserError, match="must fit into the 12 learned positions of a model"):
        speculative.speculative(gpt(), torch.tensor([0]), long, draft=gpt(length=12, position="learned"))
    with pytest.raises(UserError, match="must fit into the 24 learned positions"):
        speculative.speculative(gpt(position="learned"), torch.tensor([0]), draft=gpt(), max_new_tokens=40)
    with pytest.raises(UserError, match="heads=3 must divide width=16"):
        gpt(heads=3)
    with pytest.raises(UserError, match=r"data.shape=\[30\] is longer than the 24 positions"):
        net = gpt(position="learned").net
        GPT("tokens", V, 30, net)
