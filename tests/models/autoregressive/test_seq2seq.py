"""Sequence to sequence: torch's own Transformer on the same weights, the loss by hand, padding and sources of any length."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.models.autoregressive.seq2seq import EncoderDecoder, Seq2Seq
from genai.nn.attention import Attention, Context, CrossAttention, LearnedPositions, RotaryPositions
from genai.nn.norm import LayerNorm
from genai.nn.transformer import MLP, SwiGLU, Transformer, scaled_init

V, S = 13, 11  # ids of targets and sources; the last is the end


def seq2seq(width=16, tied=False, shared=False, sources=S, smoothing=0.1, position=RotaryPositions, **parts):
    parts = {"norm": LayerNorm, "mlp": SwiGLU, "position": position, **parts}
    cross = partial(CrossAttention, context_width=width, heads=2)
    encoder = Transformer(width, 1, partial(Attention, heads=2, causal=False), **parts)
    decoder = Transformer(width, 2, partial(Attention, heads=2), **parts, cross=cross)
    net = EncoderDecoder(sources, V, encoder, decoder, tied, shared, partial(scaled_init, std=0.3))
    return Seq2Seq("tokens", V, 15, net, smoothing)


def batch_of(sources, targets):
    """Pairs of lists of ids as a batch."""
    rows = [[V - 1, *target, V - 1] for target in targets]
    longest = max(map(len, rows))
    return {
        "source": torch.tensor([[*s, S - 1] + [-1] * (max(map(len, sources)) - len(s)) for s in sources]),
        "tokens": torch.tensor([row + [V - 1] * (longest - len(row)) for row in rows]),
        "mask": torch.tensor([[0 < i < len(row) for i in range(longest)] for row in rows]),
    }


BATCH = batch_of([[3, 1], [4, 1, 5, 9, 2, 6], []], [[1, 2, 3, 4, 5], [0], [7, 7]])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_it_computes_what_torchs_transformer_does():
    """`nn.Transformer` with the same weights; its cross-attention has biases, which are 0 here."""
    torch.manual_seed(0)
    width, heads = 16, 2
    theirs = nn.Transformer(width, heads, 2, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True)
    theirs = theirs.double().eval()
    attention = partial(Attention, heads=heads, bias=True)
    parts = {
        "norm": LayerNorm,
        "mlp": lambda w: MLP(w, nn.GELU(), 2.0, bias=True),
        "position": partial(LearnedPositions, length=9),
    }
    cross = partial(CrossAttention, context_width=width, heads=heads)
    encoder = Transformer(width, 2, partial(attention, causal=False), **parts)
    decoder = Transformer(width, 2, attention, **parts, cross=cross)
    ours = EncoderDecoder(S, V, encoder, decoder, tied=False, shared=False).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)
        for layer in theirs.decoder.layers:
            layer.multihead_attn.in_proj_bias.zero_()

    def copied(pairs):
        for own, other in pairs:
            own.load_state_dict(other if isinstance(other, dict) else other.state_dict())

    for net, stack in ((encoder, theirs.encoder), (decoder, theirs.decoder)):
        copied([(net.norm, stack.norm)])
        for block, layer in zip(net.blocks, stack.layers, strict=True):
            own = layer.self_attn
            copied(
                [
                    (block.norm1, layer.norm1),
                    (block.attention.qkv, {"weight": own.in_proj_weight, "bias": own.in_proj_bias}),
                    (block.attention.out, own.out_proj),
                    (block.mlp.up, layer.linear1),
                    (block.mlp.out, layer.linear2),
                ]
            )
            if net is encoder:
                copied([(block.norm2, layer.norm2)])
            else:
                q, kv = layer.multihead_attn.in_proj_weight.split([width, 2 * width])
                copied(
                    [
                        (block.norm_cross, layer.norm2),
                        (block.norm2, layer.norm3),
                        (block.cross.q, {"weight": q}),
                        (block.cross.kv, {"weight": kv}),
                        (block.cross.out, layer.multihead_attn.out_proj),
                    ]
                )
    source, tokens = BATCH["source"], BATCH["tokens"][:, :-1]
    padding, at = source < 0, torch.arange(9)
    x = ours.source_embed(source.clamp_min(0)) + encoder.position.table(at[: source.shape[1]])
    y = ours.embed(tokens) + decoder.position.table(at[: tokens.shape[1]])
    causal = theirs.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64)
    states = theirs(x, y, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    assert torch.allclose(ours(tokens, ours.encode(source)), ours.head(states), atol=1e-12)


def test_the_training_loss_is_smoothed_over_the_targets_and_ignores_padding():
    """Cross-entropy from .9 onehot + .1 / V by hand; what stands at padding changes nothing; validation is the likelihood."""
    torch.manual_seed(0)
    model = seq2seq().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    plain = torch.zeros(3, dtype=torch.float64)
    for b in range(3):
        source = BATCH["source"][b][BATCH["source"][b] >= 0][None]
        length = int(BATCH["mask"][b].sum())
        row = BATCH["tokens"][b, : length + 1]
        log_p = model.net(row[None, :-1], model.net.encode(source))[0].log_softmax(-1)
        exact = log_p.gather(1, row[1:, None])[:, 0]
        total = total - (0.9 * exact + 0.1 * log_p.mean(1)).sum()
        count, plain[b] = count + length, exact.sum()
    loss = model.train()(BATCH, 0)
    assert loss.weight == count == 6 + 2 + 3 and torch.allclose(loss.total, total / count, atol=1e-12)
    assert torch.allclose(model.eval()(BATCH, 0).total, -plain.sum() / count, atol=1e-12)
    assert torch.allclose(model.log_prob(BATCH, 0), plain, atol=1e-12)
    other = BATCH["tokens"].where(F.pad(BATCH["mask"][:, 1:], (1, 0), value=True), 2)
    assert not torch.equal(other, BATCH["tokens"])
    assert torch.equal(model.log_prob({**BATCH, "tokens": other}, 0), model.log_prob(BATCH, 0))


def test_the_probabilities_of_all_targets_sum_to_1():
    """Over all texts of at most 2 tokens, and the mass of longer ones, which is that of those that have not ended."""
    torch.manual_seed(0)
    model, end = seq2seq().double().eval(), V - 1
    texts = [[]] + [[a] for a in range(end)]
    ended = batch_of([[3, 1]] * len(texts), texts)
    open_ = batch_of([[3, 1]] * end**2, [[a, b] for a in range(end) for b in range(end)])
    open_["mask"][:, -1] = False
    total = sum(model.log_prob(batch, 0).exp().sum() for batch in (ended, open_))
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_embeddings_are_shared_where_asked_for():
    one = seq2seq(tied=True, shared=True, sources=V).net
    assert one.head.weight is one.embed.weight is one.source_embed.weight
    two = seq2seq(tied=True).net
    assert two.head.weight is two.embed.weight is not two.source_embed.weight
    with pytest.raises(UserError, match="sources have 11 ids and targets 13"):
        seq2seq(shared=True)


def test_parts_that_are_no_encoder_and_decoder_are_refused():
    parts = {"norm": LayerNorm, "mlp": SwiGLU, "position": RotaryPositions}
    causal = Transformer(8, 1, partial(Attention, heads=2), **parts)
    with pytest.raises(UserError, match=r"must have attention\.causal=false"):
        EncoderDecoder(S, V, causal, causal, False, False)
    with pytest.raises(UserError, match="takes pairs of texts, but this data has none"):
        EncoderDecoder(None, V, causal, causal, False, False)
    with pytest.raises(UserError, match="longer than the 9 positions"):
        seq2seq(position=partial(LearnedPositions, length=9))


def test_without_a_source_it_is_the_empty_one():
    torch.manual_seed(0)
    model = seq2seq().double().eval()
    given = {name: value for name, value in BATCH.items() if name != "source"}
    empty = {**given, "source": torch.full((3, 1), S - 1)}
    assert torch.equal(model.log_prob(given, 0), model.log_prob(empty, 0))
    assert model.null()["source"].tolist() == [S - 1]


def test_the_attention_weights_that_are_shown_are_those_that_are_used():
    torch.manual_seed(0)
    cross = CrossAttention(12, 8, 3).double()
    torch.nn.init.normal_(cross.out.weight)
    states, real = torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    x, context = torch.randn(2, 4, 12, dtype=torch.float64), Context(states, real)
    weights = cross.weights(x, context)
    assert weights.shape == (2, 3, 4, 5) and torch.allclose(weights.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert (weights[1, :, :, 3:] == 0).all() and (weights[0] > 0).all()
    values = cross.project(context).values
    assert torch.allclose(cross.out((weights @ values).transpose(1, 2).flatten(2)), cross(x, context))
