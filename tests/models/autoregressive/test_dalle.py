"""DALL-E: the sequence of caption and image, its loss, guidance and completion, against their definitions."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import PAD, Autoregressive, Capturable
from genai.models.autoregressive import dalle, decode
from genai.models.autoregressive.dalle import DALLE
from genai.nn.attention import Attention
from genai.nn.grey_levels import GreyLevels
from genai.nn.latent_space import LatentTokens
from genai.nn.norm import RMSNorm
from genai.nn.text_image import TextImageIds, TextImagePositions
from genai.nn.transformer import GELU, MLP, Transformer

LEVELS, LENGTH, SHAPE = 5, 6, (1, 3, 4)
N = math.prod(SHAPE)


def model(**given):
    torch.manual_seed(0)
    net = Transformer(
        16,
        2,
        partial(Attention, heads=2),
        partial(MLP, activation=GELU()),
        RMSNorm,
        partial(TextImagePositions, length=LENGTH, grid=(3, 4)),
    )
    made = DALLE("image", LENGTH, LatentTokens(GreyLevels("image", SHAPE, LEVELS)), net, **given).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2)
    return made


def batch(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    caption = torch.full((n, LENGTH), PAD)
    for row, size in zip(caption, (6, 3, 1, 4), strict=False):
        row[:size] = torch.randint(256, (size,), generator=g)
    image = torch.randint(LEVELS, (n, *SHAPE), generator=g) * (2 / (LEVELS - 1)) - 1
    return {"caption": caption, "image": image, "label": torch.zeros(n, dtype=torch.int64)}


def whole(m, caption, codes):
    """Logits (B, T + 1, codes) of the codes after the beginning of the image and each of `codes`, without a cache."""
    logits = m.logits(m.ids.sequence(caption, codes))
    return logits[:, LENGTH + 1 :, :LEVELS]


def test_ids_of_codes_bytes_and_ends_are_disjoint_and_in_the_papers_order():
    ids = TextImageIds(LEVELS, LENGTH)
    made = ids.sequence(batch()["caption"], torch.tensor([[0, 4]] * 3))
    assert made.shape == (3, LENGTH + 4) and made[0, 0] == LEVELS + 257 and made[0, LENGTH + 1] == LEVELS + 258
    assert (made[:, 1 : LENGTH + 1] == batch()["caption"] + LEVELS).all() and made[:, -2:].tolist() == [[0, 4]] * 3
    assert ids.mask == LEVELS + 259 and ids.vocab_size == LEVELS + 260 and made.max() < ids.vocab_size


def test_the_loss_is_one_eighth_of_the_captions_and_seven_of_the_images():
    m, b = model(), batch()
    text, image = m.nats(b)
    codes = m.latent.encode(b)
    logits = m.logits(m.ids.sequence(b["caption"], codes))
    for i, size in enumerate((6, 4, 2)):  # with the padding that ends a caption
        p = logits[i, :LENGTH, LEVELS:].log_softmax(-1).gather(1, b["caption"][i, :, None])[:, 0]
        assert torch.allclose(text[i, :size], -p[:size]) and (text[i, size:] == 0).all()
    p = logits[:, LENGTH + 1 : -1, :LEVELS].log_softmax(-1).gather(2, codes[..., None])[..., 0]
    assert torch.allclose(image, -p)
    losses = m(b, 0)
    each = torch.stack([text[i, :size].mean() for i, size in enumerate((6, 4, 2))])
    assert torch.allclose(losses.total, each.mean() / 8 + image.mean() * 7 / 8) and losses.weight == 3


def test_a_uniform_head_costs_the_logarithm_of_the_ids_of_each_medium():
    m = model()
    torch.nn.init.zeros_(m.head.weight)
    logs = m(batch(), 0).logs
    assert logs["text"][0].item() == pytest.approx(math.log(257))
    assert logs["image"][0].item() == pytest.approx(math.log(LEVELS))


def test_nothing_depends_on_what_comes_after_it():
    m, b = model(), batch(1)
    sequence = m.ids.sequence(b["caption"], m.latent.encode(b))
    x = m.embed(sequence).detach().requires_grad_()
    y = m.transformer(x)
    for t in (0, LENGTH, LENGTH + 1, LENGTH + 5):
        (grad,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
        seen = grad[0].abs().sum(-1) > 0
        assert seen[: t + 1].all() and not seen[t + 1 :].any()


def test_training_drops_whole_captions_and_does_not_learn_to_write_them():
    m, b = model(label_dropout=1.0).train(), batch()
    text, image = m.nats(b)
    assert (text == 0).all() and m(b, 0).logs["text"][0] == 0
    empty = {**b, "caption": torch.full_like(b["caption"], PAD)}
    assert torch.allclose(image, m.eval().nats(empty)[1])


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_samples_are_those_of_the_whole_sequence_anew_for_each_code(w):
    m, b, seeds = model(), batch(), torch.arange(3) + 7
    made = dalle.sample(m, seeds, {"caption": b["caption"]}, guidance=w, temperature=0.7)
    u, codes = rng.uniform(seeds, (N,), stream=rng.TOKENS), torch.zeros(3, 0, dtype=torch.int64)
    null = torch.full_like(b["caption"], PAD)
    for i in range(N):
        given, free = (whole(m, caption, codes)[:, -1].float() for caption in (b["caption"], null))
        logits = free + w * (given - free)
        codes = torch.cat([codes, decode.draw((logits / 0.7).softmax(-1), u[:, i : i + 1])], 1)
    assert torch.equal(made["tokens"], codes) and made["image"].shape == (3, *SHAPE)
    alone = dalle.sample(m, seeds[1:2], {"caption": b["caption"][1:2]}, guidance=w, temperature=0.7)
    assert torch.equal(alone["tokens"][0], codes[1])


def test_a_negative_caption_takes_the_place_of_the_empty_one():
    m, b = model(), batch()
    negative = b["caption"].roll(1, 0)
    with torch.no_grad():
        state = m.start({"caption": b["caption"], "negative": negative, "guidance": torch.full((3,), 3.0)}, 3, N)
        found = m.next(torch.full((3, 1), m.first), state)
    none = torch.zeros(3, 0, dtype=torch.int64)
    given, away = (whole(m, c, none)[:, -1].float() for c in (b["caption"], negative))
    assert torch.allclose(found, away + 3 * (given - away), atol=1e-5)


def test_prompts_of_different_lengths_continue_as_if_alone():
    m, b = model(), batch()
    codes, kept = m.latent.encode(b), (5, 2, 0)
    rows = [F.pad(row[:k], (1, 0), value=m.first) for row, k in zip(codes, kept, strict=True)]
    pad = torch.tensor([6 - len(row) for row in rows])
    prompts = torch.stack([F.pad(row, (int(p), 0)) for row, p in zip(rows, pad, strict=True)])
    cond = {"caption": b["caption"], "guidance": torch.full((3,), 2.0)}
    given = {**cond, "tokens": prompts, "pad": pad, "lead": torch.ones(3, dtype=torch.int64)}
    made = decode.generate(m, torch.arange(3), given, max_new_tokens=4)
    for i, k in enumerate(kept):
        own = {"caption": b["caption"][i : i + 1], "guidance": torch.full((1,), 2.0), "tokens": rows[i][None]}
        alone = decode.generate(m, torch.tensor([i]), own, max_new_tokens=4)
        assert torch.equal(alone["tokens"][0], made["tokens"][i])
        assert torch.allclose(alone["log_prob"][0], made["log_prob"][i], atol=1e-5)
        text = torch.cat([codes[i, :k], alone["tokens"][0]])
        logits = [
            whole(m, c, text[None])[0, k : k + 4].float() for c in (b["caption"][i : i + 1], m.null()["caption"][None])
        ]
        logs = torch.lerp(logits[1], logits[0], 2.0).log_softmax(-1).gather(1, text[k:, None])[:, 0]
        assert torch.allclose(alone["log_prob"][0], logs, atol=1e-5)


def test_a_picture_is_completed_from_what_is_kept():
    m, b = model(), batch()
    made = dalle.sample(m, torch.arange(3), {"caption": b["caption"]}, image=b["image"])
    codes = m.latent.encode(b)
    assert torch.equal(made["tokens"][:, :4], codes[:, :4])  # one of three rows is the upper half
    assert torch.allclose(made["image"][:, :, :1], b["image"][:, :, :1].to(made["image"]))
    assert (made["log_prob"][:, :4] == 0).all() and (made["log_prob"][:, 4:] < 0).all()
    mask = torch.zeros(3, 1, 3, 4)
    mask[:, :, :2] = 1
    assert torch.equal(dalle.sample(m, torch.arange(3), image=b["image"], mask=mask)["tokens"][:, :8], codes[:, :8])


@pytest.mark.parametrize("kept", [[2], [0, 1, 2]], ids=str)
def test_a_mask_that_is_no_beginning_is_refused(kept):
    mask = torch.zeros(3, 1, 3, 4)
    mask[:, :, kept] = 1
    with pytest.raises(UserError, match="only fill in the end of an image"):
        dalle.sample(model(), torch.arange(3), image=batch()["image"], mask=mask)


def test_positions_are_of_places_rows_and_columns():
    p = TextImagePositions(8, LENGTH, (3, 4))
    found, none = p(torch.arange(p.length), 4)
    assert none is None and torch.equal(found[: LENGTH + 2], p.text.weight)
    assert torch.equal(found[LENGTH + 2 :].view(3, 4, 8), p.row.weight[:, None] + p.column.weight)


def test_is_a_model_of_the_protocol_and_can_be_captured():
    m = model()
    assert isinstance(m, Autoregressive) and isinstance(m, Capturable) and m.fix(m.start(None, 1, N))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text_weight": 2.0}, "model.text_weight=2.0 must be a number at least 0 and at most 1"),
        ({"label_dropout": 0.0, "guidance": 2.0}, "model.guidance=2.0 needs a model that was trained with and without"),
    ],
)
def test_refuses_arguments(given, said):
    with pytest.raises(UserError, match=said):
        model(**given)


def test_refuses_other_data_and_other_grids():
    m, b = model(), batch()
    for wrong in ({"image": b["image"]}, {**b, "caption": b["caption"][:, :4]}):
        with pytest.raises(UserError, match=r"a DALLE takes captions of model.length=6 bytes, and this data has"):
            m.prepare([wrong])
    with pytest.raises(UserError, match="the first stage takes image of shape"):
        m.prepare([{**b, "image": b["image"][..., :2]}])
    with pytest.raises(
        UserError,
        match=r"must be TextImagePositions of length=6 with a grid of 12 codes, got TextImagePositions of grid=\[2, 4\]",
    ):
        net = Transformer(
            16,
            1,
            partial(Attention, heads=2),
            partial(MLP, activation=GELU()),
            RMSNorm,
            partial(TextImagePositions, length=6, grid=(2, 4)),
        )
        DALLE("image", LENGTH, m.latent, net)
