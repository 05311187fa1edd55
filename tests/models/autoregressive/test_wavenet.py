"""WaveNet: distributions that sum to 1, causality, masks, and a step on any device that equals the whole."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.data.audio import Tones, entropy_bits
from genai.modalities.mel import Mel
from genai.models.autoregressive import decode
from genai.models.autoregressive.wavenet import UNIFORM, Categorical, Logistics, WaveNet
from genai.models.autoregressive.wavenet_cpu import ArrayQueues

LEVELS = 32
OUTPUTS = {"categorical": Categorical(LEVELS), "logistics": Logistics(LEVELS, 3)}


def wavenet(
    output="logistics",
    dilations=(1, 2, 4),
    levels=LEVELS,
    classes=3,
    speakers=2,
    mels=None,
    hop=None,
    first_kernel=4,
    kernel=2,
):
    """A WaveNet with weights far from their first ones."""
    torch.manual_seed(0)
    out = output if not isinstance(output, str) else OUTPUTS[output]
    model = WaveNet(
        "tokens", levels, 50, classes, speakers, mels, hop, 0.1, 8, 6, 3, first_kernel, kernel, dilations, out
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


@pytest.mark.parametrize("levels", [2, 17, 256, 2**16])
def test_logistics_sum_to_1_and_are_the_mass_between_edges(levels):
    """Both forms, that of training and that of decoding, equal the definition in NumPy's float64."""
    torch.manual_seed(0)
    output = Logistics(levels, 4)
    out = 3 * torch.randn(5, output.outputs, dtype=torch.float64)
    log_p = output.log_probs(out).double()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(5).double(), rtol=0, atol=2e-6)
    code = torch.tensor([0, 1, levels // 2, levels - 2, levels - 1])
    for row in range(5):
        nats = output.nats(out[row].expand(5, -1), code).double()
        torch.testing.assert_close(-nats, log_p[row, code], rtol=2e-5, atol=2e-5)
    weight, mean, rate = (part.numpy() for part in output.parameters(torch, out))
    edges = np.arange(1, levels) * 2 / (levels - 1) - 1 - 1 / (levels - 1)
    with np.errstate(over="ignore"):
        below = 1 / (1 + np.exp(-(edges[:, None] - mean[:, None]) * rate[:, None]))  # (5, levels - 1, 4)
    cdf = (below * (weight / weight.sum(-1, keepdims=True))[:, None]).sum(-1)
    p = np.diff(cdf, prepend=0, append=1) * (1 - UNIFORM) + UNIFORM / levels
    np.testing.assert_allclose(log_p.exp().numpy(), p, rtol=1e-4, atol=1e-12)


def test_logistics_have_gradients_everywhere():
    """Also far from the code, where a difference of two sigmoids would be 0 - 0."""
    out = torch.tensor([[0.0, 50.0, 3.0]], requires_grad=True)
    nats = Logistics(256, 1).nats(out, torch.tensor([0]))
    nats.backward()
    assert nats.isfinite() and out.grad.isfinite().all()
    assert nats.item() == pytest.approx(-math.log(UNIFORM / 256), abs=1e-3)


@pytest.mark.parametrize("kernel", [2, 3])
def test_each_output_depends_on_its_receptive_field_and_on_nothing_later(kernel):
    model = wavenet(kernel=kernel)
    assert model.receptive_field == 4 + 7 * (kernel - 1)
    tokens = torch.randint(LEVELS, (1, 40))
    seen = {}
    embedded = model.embed(tokens).detach().requires_grad_()
    model.embed.register_forward_hook(lambda *_: embedded)
    out, _ = model.outputs(tokens, model.biases(None, 1)[:, None])
    for t in (0, 20, 39):
        (grad,) = torch.autograd.grad(out[0, t].sum(), embedded, retain_graph=True)
        seen[t] = grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
        assert seen[t] == list(range(max(0, t + 1 - model.receptive_field), t + 1))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("arrays", [True, False])
def test_a_step_equals_the_whole(output, arrays, monkeypatch):
    """With prompts of different lengths, conditions and a spectrogram; by NumPy, and as on others."""
    model = wavenet(output, dilations=(1, 4, 16, 64), kernel=3, mels=5, hop=64)
    monkeypatch.setattr(ArrayQueues, "suits", staticmethod(lambda model: arrays))
    kind = next(model.parameters()).dtype
    n, pad = 3000 if arrays else 400, torch.tensor([0, 7, 30])
    tokens = torch.randint(LEVELS, (3, n))
    cond = {"label": torch.tensor([0, 2, 1]), "speaker": torch.tensor([1, 1, 0]), "mel": torch.randn(3, 5, 40).to(kind)}
    with torch.inference_mode():
        state = model.start(cond, 3, n, pad)
        steps = [model.next(tokens[:, :40], state)]
        assert isinstance(state["queues"], ArrayQueues) == arrays
        steps += [model.next(tokens[:, t : t + 1], state) for t in range(40, n)]
        for b in range(3):
            own = {name: value[b : b + 1] for name, value in cond.items()}
            local = model.at(model.frames(own), torch.arange(n - pad[b])[None])
            out, _ = model.outputs(tokens[b : b + 1, pad[b] :], model.biases(own, 1)[:, None] + local)
            whole = model.output.log_probs(out)[0, 39 - pad[b] :].float()
            torch.testing.assert_close(torch.stack(steps)[:, b], whole, rtol=0, atol=1e-5)


def test_layers_of_one_tap_have_no_queue():
    """Where only the first convolution looks back, a step equals the whole too."""
    model = wavenet(dilations=(1, 1), kernel=1, first_kernel=3)
    tokens = torch.randint(LEVELS, (2, 12))
    with torch.inference_mode():
        state = model.start(None, 2, 12)
        steps = [model.next(tokens[:, t : t + 1], state) for t in range(12)]
        out, _ = model.outputs(tokens, model.biases(None, 2)[:, None])
    torch.testing.assert_close(torch.stack(steps, 1), model.output.log_probs(out), rtol=0, atol=1e-5)


def test_samples_depend_on_their_seed_alone():
    """Not on the batch, nor on how many samples are drawn; and ln p is what the whole model says."""
    model = wavenet().float()
    cond = {"label": torch.tensor([0, 1, 2, 0]), "speaker": torch.tensor([0, 1, 0, 1])}
    seeds = torch.arange(4)
    whole = decode.generate(model, seeds, cond, max_new_tokens=200)
    for b in range(4):
        own = {name: value[b : b + 1] for name, value in cond.items()}
        alone = decode.generate(model, seeds[b : b + 1], own, max_new_tokens=100)
        assert torch.equal(alone["tokens"][0], whole["tokens"][b, :100])
    tokens = torch.cat([torch.full((4, 1), model.first), whole["tokens"]], 1)
    torch.testing.assert_close(
        model.log_prob({"tokens": tokens, **cond}, 0), whole["log_prob"].sum(1), rtol=1e-5, atol=1e-3
    )


def test_a_mask_changes_nothing_of_what_is_real():
    """Losses, likelihoods and gradients of clips side by side, padded, are those of each alone, in float64 to 1e-10."""
    model = wavenet()
    lengths = [30, 11, 1]
    clips = [torch.randint(LEVELS, (1, 1 + n)) for n in lengths]
    tokens = torch.cat([F.pad(clip, (0, 30 - n), value=9) for clip, n in zip(clips, lengths, strict=True)])
    mask = torch.arange(31) <= torch.tensor(lengths)[:, None]
    mask[:, 0] = False
    batch = {"tokens": tokens, "mask": mask, "label": torch.tensor([0, 1, 2])}
    whole = model(batch, 0)
    whole.total.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = [-model.log_prob({"tokens": clip, "label": torch.tensor([i])}, 0) for i, clip in enumerate(clips)]
    total = torch.cat(alone).sum() / 42
    total.backward()
    assert whole.weight == 42
    torch.testing.assert_close(whole.total, total, rtol=0, atol=1e-10)
    torch.testing.assert_close(-model.log_prob(batch, 0), torch.cat(alone), rtol=0, atol=1e-10)
    for ours, theirs in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=0, atol=1e-10)
    # What stands where nothing is real does not matter either.
    batch["tokens"] = torch.where(mask | (torch.arange(31) == 0), tokens, 3)
    torch.testing.assert_close(model(batch, 0).total, whole.total, rtol=0, atol=1e-10)


def test_conditions_change_the_distribution_and_may_be_left_out():
    model = wavenet()
    tokens = torch.randint(LEVELS, (1, 20))
    found = [
        model.nats({"tokens": tokens, **cond})
        for cond in ({}, {"label": torch.tensor([1])}, {"label": torch.tensor([3]), "speaker": torch.tensor([2])})
    ]
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[0], found[2])  # the null conditions
    assert {name: int(value) for name, value in model.null().items()} == {"label": 3, "speaker": 2}
    model.train().label_dropout = 1.0
    assert torch.equal(model.nats({"tokens": tokens, "label": torch.tensor([1])}), found[0])


def test_a_spectrogram_is_followed_between_its_frames():
    """Its biases are those of frame k at sample k * hop, of the mean of two half-way, and of the last after it."""
    model = wavenet(mels=5, hop=4)
    mel = torch.randn(2, 5, 3, dtype=torch.float64)
    frames = model.frames({"mel": mel})
    at = model.at(frames, torch.arange(12)[None])
    torch.testing.assert_close(at[:, [0, 4, 8, 11]], frames[:, [0, 1, 2, 2]])
    torch.testing.assert_close(at[:, 2], frames[:, :2].mean(1))
    tokens = torch.randint(LEVELS, (2, 13))
    plain, following = (model.nats({"tokens": tokens, **cond}) for cond in ({}, {"mel": mel}))
    assert not torch.allclose(plain, following)
    assert torch.equal(plain, model.nats({"tokens": tokens, "mel": torch.zeros_like(mel)}))
    assert "mel" in model.null()


@pytest.mark.parametrize(("samples", "hop"), [(100, 64), (128, 64), (97, 7), (300, 300), (5, 64)])
def test_a_spectrogram_is_the_same_whatever_silence_a_clip_is_padded_with(samples, hop):
    """Then neither does what follows the clip depend on the longest one of a batch."""
    mel, model = Mel(1000, 5, hop), wavenet(mels=5, hop=hop)
    x = torch.rand(1, 1, samples) * 2 - 1
    alone, padded = (
        model.at(model.frames({"mel": mel.encode(F.pad(x, (0, more))).double()}), torch.arange(900)[None])
        for more in (0, 500)
    )
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-5)


def test_learns_three_sines_by_heart():
    torch.manual_seed(0)
    t = torch.arange(121)
    tokens = ((torch.sin(t * torch.tensor([[0.2], [0.5], [1.1]])) + 1) * 15.5).round().long()
    model = WaveNet(
        "tokens", LEVELS, 120, None, None, None, None, 0.0, 16, 16, 4, 4, 2, [1, 2, 4], Logistics(LEVELS, 2)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        optimizer.zero_grad()
        loss = model({"tokens": tokens}, step).total
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7  # uniform: 3.47


def test_no_model_beats_the_entropy_of_tones():
    """The process's own distribution has its entropy; a WaveNet, however bad, has more."""
    data = Tones(200, 8000, 0.05, "audio", None, None, None, 8)
    split = data.splits["train"]
    batch = split.batch(torch.arange(200), None)
    codes = (batch["audio"][:, 0].double() * 128 + 128).long()  # (200, 400)
    assert codes.min() > 0 and codes.max() < 255  # the process is never clipped
    model = WaveNet("tokens", 256, 400, 8, None, None, None, 0.0, 8, 8, 4, 4, 2, [1, 2], Logistics(256, 2)).eval()
    tokens = F.pad(codes, (1, 0), value=128)
    with torch.no_grad():
        bits = -model.log_prob({"tokens": tokens, "label": batch["label"]}, 0) / math.log(2)
    assert bits.mean() > entropy_bits(400)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"field": "image"}, "takes tokens, but this data has image: choose codes of audio"),
        ({"vocab_size": None}, "takes tokens, but this data has tokens"),
        ({"mels": 40}, "model.mels=40 and model.hop=None belong together"),
        ({"output": Categorical(16)}, "model.output.levels=16 must be 8, the number of codes"),
        ({"output": Logistics(256, 2)}, "model.output.levels=256 must be 8, the number of codes"),
        ({"dilations": []}, r"dilations=\[\] must have at least one layer"),
    ],
)
def test_refuses_other_data(given, sentence):
    plain = {
        "field": "tokens",
        "vocab_size": 8,
        "length": 5,
        "classes": None,
        "speakers": None,
        "mels": None,
        "hop": None,
        "label_dropout": 0.0,
    }
    plain |= {"width": 4, "skip": 4, "embedding": 2, "first_kernel": 2, "kernel": 2, "dilations": [1]}
    with pytest.raises(UserError, match=sentence):
        WaveNet(**{**plain, "output": Categorical(8), **given})
