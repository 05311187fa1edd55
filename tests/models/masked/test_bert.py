"""BERT: the network against Hugging Face's, the draws of masks, the loss on chosen tokens alone, and filling in."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from genai.core.errors import UserError
from genai.core.protocols import SPECIALS
from genai.modalities.text import Text, encode_prompts
from genai.modalities.tokenizers import Char, WithSpecials
from genai.models.masked.bert import BERT
from genai.models.masked.mdlm import MDLM
from genai.models.masked.published import convert_names
from genai.models.masked.sampling import ancestral, fill
from genai.nn import norm
from genai.nn.attention import Attention, LearnedPositions, RotaryPositions
from genai.nn.token_transformer import HeadTransform, TokenTransformer
from genai.nn.transformer import GELU, MLP, Transformer, TwoSidedShift

WORDS = 9
V = WORDS + len(SPECIALS)
MASK, PAD = WORDS, V - 1


def net(width=16, layers=2, position=RotaryPositions, shift=TwoSidedShift, causal=False, seed=0):
    torch.manual_seed(seed)
    attention = partial(Attention, heads=4, causal=causal)
    return TokenTransformer(
        V, Transformer(width, layers, attention, partial(MLP, activation=GELU()), norm.RMSNorm, position, shift), False
    )


def bert(length=12, **options):
    own = {key: options.pop(key) for key in ("share", "random", "kept", "whole_words") if key in options}
    return BERT("tokens", V, True, length, net(**options), **own).eval()


def text(b=4, t=13, seed=1):
    return torch.randint(WORDS, (b, t), generator=torch.Generator().manual_seed(seed))


def test_logits_are_those_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=20,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(config).eval()
    for p in theirs.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, p.mean().item(), 0.1)
    layer = partial(norm.LayerNorm, eps=1e-12)
    transformer = Transformer(
        32,
        3,
        partial(Attention, heads=4, bias=True, causal=False),
        partial(MLP, activation=GELU(), bias=True),
        layer,
        partial(LearnedPositions, length=20),
        post_norm=True,
    )
    ours = TokenTransformer(
        50, transformer, True, transform=partial(HeadTransform, activation=GELU(), norm=layer), bias=True
    ).eval()
    ours.load_state_dict(convert_names(theirs.state_dict()))
    tokens = torch.randint(50, (3, 20))
    real = torch.arange(20) < torch.tensor([[20], [13], [7]])
    with torch.no_grad():
        want = theirs(tokens, attention_mask=real.long()).logits
        got = ours(tokens, mask=real[:, None, None])
    assert torch.allclose(got[real], want[real], atol=1e-4, rtol=0) and want.std() > 0.5


def test_80_10_10_over_a_million_tokens():
    """Counts within five standard deviations of the shares; random tokens also hit the original."""
    model, n = bert(), 10**6
    tokens = torch.full((1000, 1000), 3)
    torch.manual_seed(0)
    found = model.corrupt(tokens).flatten()
    counts = found.bincount(minlength=V)
    for count, share in (
        (counts[MASK], 0.8),
        (counts[3], 0.1 + 0.1 / WORDS),
        *((counts[i], 0.1 / WORDS) for i in range(WORDS) if i != 3),
    ):
        assert abs(count - share * n) < 5 * math.sqrt(share * (1 - share) * n)
    assert counts[MASK + 1 :].sum() == 0, "no other special id"


def test_15_percent_are_chosen_uniformly_and_specials_never():
    model, eligible = bert(), torch.ones(10**5, 20, dtype=torch.bool)
    eligible[:, 7] = False
    eligible[::2, 10:] = False  # rows of 9 and of 19
    torch.manual_seed(0)
    at, chosen = model.choose(eligible)
    assert chosen.sum(1)[1::2].eq(round(0.15 * 19)).all() and chosen.sum(1)[::2].eq(round(0.15 * 9)).all()
    hits = torch.zeros(eligible.shape).scatter_add_(1, at, chosen.float())
    assert hits.max() == 1 and not hits[~eligible].any()
    share = hits[1::2].mean(0)[eligible[1]]
    assert (share - 3 / 19).abs().max() < 5 * math.sqrt(3 / 19 / 5e4)
    tokens = text()
    tokens[:, ::2] = torch.tensor([MASK, MASK + 1, MASK + 2, PAD])[:, None]
    assert not model.eligible({"tokens": tokens})[:, ::2].any() and model.eligible({"tokens": tokens})[:, 1::2].all()
    none = {"tokens": torch.full((2, 13), PAD)}
    loss = model(none, 0)
    assert loss.total == 0 and loss.weight == 0


def test_words_are_chosen_whole_each_with_the_same_probability():
    """Tokens of words of 1 to 5 tokens alike, within five standard deviations; specials and what may not be hidden never."""
    model = bert(whole_words=True)
    words = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5, 5, 5, 6, 6]).expand(10**5, -1)
    eligible = torch.ones(words.shape, dtype=torch.bool)
    eligible[:, 2] = False
    eligible[::2, 8:] = False
    torch.manual_seed(0)
    at, chosen = model.choose_words(eligible, words)
    hits = torch.zeros(words.shape).scatter_(1, at, chosen.float())
    assert not hits[~eligible].any()
    for first, last in ((0, 1), (3, 4), (4, 7), (8, 13), (13, 15)):
        part, real = hits[:, first:last], eligible[:, first:last]
        assert ((part.sum(1) == real.sum(1)) | (part.sum(1) == 0)).all(), "of a word all tokens, or none"
    share = hits[1::2].mean(0)[eligible[1]]
    assert (share - 0.15).abs().max() < 5 * math.sqrt(0.15 * 0.85 / 5e4)
    assert abs(hits[1::2].sum() / eligible[1::2].sum() - 0.15) < 1e-3
    assert hits[1::2].sum(1).max() <= 0.15 * 14 + 5, "no more than the share and a word"


def test_the_loss_of_whole_words():
    model, tokens = bert(random=0.0, kept=0.0, whole_words=True), text()
    words = torch.arange(13).div(3, rounding_mode="floor").expand(4, -1)
    torch.manual_seed(0)
    at, chosen = model.choose_words(model.eligible({"tokens": tokens}), words)
    hidden = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, at, chosen)
    assert hidden.any() and not hidden.all()
    torch.manual_seed(0)
    loss = model({"tokens": tokens, "word": words}, 0)
    nats, _ = model.score_hidden({"tokens": tokens}, hidden)
    assert loss.weight == hidden.sum() and torch.allclose(loss.total, nats.sum() / hidden.sum(), atol=1e-6)
    with pytest.raises(UserError, match=r"set data\.words=true"):
        model({"tokens": tokens}, 0)


def test_the_masks_are_drawn_anew_from_torchs_state():
    model, batch = bert(), {"tokens": text(64)}
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(batch, 0).total.item())
    assert losses[0] == losses[1] != losses[2]


def test_the_loss_is_of_the_chosen_tokens_alone(monkeypatch):
    """It equals the mean over full logits at chosen positions, and no hidden original reaches the network."""
    model, tokens = bert(random=0.0, kept=0.0), text()
    at = torch.tensor([[2, 5], [0, 1], [12, 3], [4, 9]])
    chosen = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    monkeypatch.setattr(model, "choose", lambda eligible: (at, chosen))
    seen = tokens.clone()
    for row, (places, which) in enumerate(zip(at, chosen, strict=True)):
        seen[row, places[which]] = MASK
    log_p = model.net(seen)[..., :WORDS].log_softmax(-1)
    wanted = -log_p.gather(-1, tokens[..., None])[..., 0].gather(1, at)[chosen].mean()
    loss = model({"tokens": tokens}, 0)
    assert torch.allclose(loss.total, wanted, atol=1e-6) and loss.weight == 6
    hidden = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, at, chosen)
    nats, right = model.score_hidden({"tokens": tokens}, hidden)
    assert torch.allclose(nats.sum() / 6, wanted, atol=1e-6) and not nats[~hidden].any() and not right[~hidden].any()
    other = torch.where(hidden, (tokens + 1) % WORDS, tokens)
    assert torch.equal(model.predict(tokens.masked_fill(hidden, MASK)), model.predict(other.masked_fill(hidden, MASK)))


def test_a_token_reads_both_sides():
    """By autograd: the states of every position depend on every other."""
    network = net().transformer
    x = torch.randn(1, 9, 16, requires_grad=True)
    y = network(x)
    for t in range(9):
        (grad,) = torch.autograd.grad(y[0, t, 0], x, retain_graph=True)
        assert (grad[0].abs().amax(-1) > 0).all()


def test_padding_changes_nothing():
    model, tokens = bert(), text(2, 9)
    with torch.no_grad():
        alone = model.predict(tokens)
        padded = nn.functional.pad(tokens, (0, 4), value=PAD)
        assert torch.allclose(model.predict(padded, padded=True)[:, :9], alone, atol=1e-5)
        assert not torch.allclose(model.predict(padded)[:, :9], alone, atol=1e-3)


def test_features_are_the_mean_state_without_padding():
    model, tokens = bert(), text(2, 9)
    with torch.no_grad():
        found = model.features(nn.functional.pad(tokens, (0, 4), value=PAD))
        assert found.shape == (2, 16) and torch.allclose(found, model.net.states(tokens).mean(1), atol=1e-5)
        assert torch.allclose(model.net.head(model.net.states(tokens))[..., :WORDS], model.predict(tokens))


TOKENIZER = WithSpecials(Char("\n abcdef"[:WORDS]))


def test_specials_are_ids_of_the_tokenizers_own_and_letters_stay_text():
    wide = WithSpecials(Char("".join(sorted(set("[MASK] of england\n\\")))))
    ids = wide.encode("a [MASK]").tolist()
    assert max(ids) < wide.words and wide.decode(ids) == "a [MASK]" and wide.mask == wide.words
    assert wide.decode([*ids, *range(wide.words, wide.vocab_size)]) == "a [MASK]" + "".join(SPECIALS)
    cond = encode_prompts(wide, ["of [MASK]ng"])
    assert (cond["tokens"] == wide.mask).sum() == 1 and wide.decode(cond["tokens"][0].tolist()) == "\nof [MASK]ng"
    assert (encode_prompts(wide, [r"of \[MASK]"])["tokens"] < wide.words).all()
    with pytest.raises(UserError, match="in some prompts and not in others"):
        encode_prompts(wide, ["of [MASK]", "of"])
    again = Text.from_state(Text(wide).state())
    assert again.tokenizer.vocab_size == wide.vocab_size and again.state() == Text(wide).state()
    with pytest.raises(UserError, match="inside it and closed alone"):
        Text.from_state({"tokenizer": {**wide.state(), "inner": wide.state()}})


def samples(sampler, model, prompts, seeds, **options):
    cond = encode_prompts(WithSpecials(Char("\n abcdefg")), prompts) if prompts else None
    return sampler(model, torch.tensor(seeds), cond, **options)


@pytest.mark.parametrize("sampler", [fill, ancestral])
def test_a_sample_depends_on_its_seed_and_prompt_alone(sampler):
    model = bert()
    prompts = ["ab[MASK]c[MASK][MASK] d", "[MASK]a", "f[MASK]e[MASK]"]
    options = {"temperature": 1.0}
    together = samples(sampler, model, prompts, [5, 6, 7], **options)
    for i, prompt in enumerate(prompts):
        alone = samples(sampler, model, [prompt], [5 + i], **options)
        n = alone["length"][0]
        assert together["length"][i] == n == len(prompt.replace("[MASK]", "x"))
        assert torch.equal(together["tokens"][i, :n], alone["tokens"][0, :n])
        assert torch.allclose(together["log_prob"][i, :n], alone["log_prob"][0, :n], atol=1e-5)
    assert together["tokens"].shape == together["given"].shape == together["log_prob"].shape
    free = samples(sampler, model, None, [0, 1, 2])
    assert free["tokens"].shape == (3, 12) and (free["tokens"] < WORDS).all() and not free["given"].any()


def test_what_a_prompt_gives_stays_and_the_most_certain_comes_first():
    model, seen = bert(), []
    batch = samples(fill, model, ["ab[MASK]c[MASK][MASK] d"], [0], on_step=lambda i, n, s: seen.append(s["tokens"][0]))
    assert TOKENIZER.decode(batch["tokens"][0].tolist())[:2] == "ab" and len(seen) == 3
    assert batch["given"][0].tolist() == [True, True, False, True, False, False, True, True]
    assert [int((row == MASK).sum()) for row in seen] == [2, 1, 0]
    cond = encode_prompts(WithSpecials(Char("\n abcdefg")), ["ab[MASK]c[MASK][MASK] d"])["tokens"]
    with torch.no_grad():
        log_p, best = model.predict(cond).log_softmax(-1)[0, 1:].max(-1)
    first = log_p.masked_fill(batch["given"][0], -torch.inf).argmax()
    assert seen[0][first] == best[first] == batch["tokens"][0, first]
    assert batch["log_prob"][0, first] == pytest.approx(log_p[first].item(), abs=1e-5)
    assert not batch["log_prob"][batch["given"]].any() and (batch["log_prob"][~batch["given"]] < 0).all()
    at_once = samples(fill, model, ["ab[MASK]c[MASK][MASK] d"], [0], steps=1)
    assert torch.equal(at_once["tokens"][0][~at_once["given"][0]], best[~at_once["given"][0]])


def test_a_prompt_is_continued_up_to_the_end_of_the_window():
    model = bert()
    batch = samples(fill, model, ["abc"], [0])
    assert batch["tokens"].shape == (1, 12) and batch["given"].sum() == 3
    assert samples(fill, model, ["abc"], [0], max_new_tokens=4)["length"] == 7
    for prompts, options in ((["a" * 13], {}), (["abc"], {"max_new_tokens": 10}), (["a" * 12 + "[MASK]"], {})):
        with pytest.raises(UserError, match="must fit into the 12 tokens that this model reads at once"):
            samples(fill, model, prompts, [0], **options)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"data\.specials=true"):
        BERT("tokens", V, False, 12, net())
    with pytest.raises(UserError, match=r"attention\.causal=false"):
        MDLM("tokens", V, True, 12, net(causal=True, shift=None))
    with pytest.raises(UserError, match="a TwoSidedShift sees the token after each"):
        net(causal=True)
    with pytest.raises(UserError, match="longer than the 12 positions"):
        BERT("tokens", V, True, 12, net(position=partial(LearnedPositions, length=12)))
    with pytest.raises(UserError, match="make their sum at most 1"):
        bert(random=0.6, kept=0.5)
    with pytest.raises(UserError, match="takes tokens"):
        BERT("image", V, True, 12, net())


def test_documents_are_read_as_if_alone():
    model, tokens = bert(), text(1, 9)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        whole = model.predict(tokens, documents=documents)
        parts = [model.predict(tokens[:, :4]), model.predict(tokens[:, 4:])]
    assert torch.allclose(whole, torch.cat(parts, 1), atol=1e-5)
