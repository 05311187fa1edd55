"""MelodyRNN: an LSTM over the events of a melody that looks back by bars and attends to its last outputs (Waite, 2016)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, Losses
from genai.models.autoregressive.likelihood import mean_loss, nats_of


class Features(nn.Module):
    """The input of each step: the last event, those one and two bars before the next, whether the last repeats, and the bar.

    The lookback features of Waite (2016), "Generating Long-Term Structure in Songs and Stories", each as an embedding, summed.
    For the event t that is to be predicted they are the events t - 1, t - bar and t - 2 bar, whether the event t - 1 is equal to
    the events one and two bars before it, and t modulo the bar.

    Args:
        vocab_size: number of token ids.
        width: of the sum.
        bar: tokens of a bar.
    """

    def __init__(self, vocab_size: int, width: int, bar: int):
        super().__init__()
        self.bar, self.none = bar, vocab_size
        self.event = nn.Embedding(vocab_size, width)
        self.lookback = nn.ModuleList(nn.Embedding(vocab_size + 1, width, padding_idx=vocab_size) for _ in range(2))
        self.repeats = nn.Parameter(torch.zeros(2, width))
        self.beat = nn.Embedding(bar, width)

    @property
    def reach(self) -> int:
        """Return how many of the last tokens a step depends on."""
        return 2 * self.bar + 1

    def forward(self, history: Tensor, at: Tensor) -> Tensor:
        """Return features (B, T, width) after each of the last T tokens of a history.

        Args:
            history: int64 (B, 2 bar + T), `none` before the first token.
            at: int64 (B or 1, T), the index of each of the last T tokens in its text.
        """
        bar, last = self.bar, history[:, 2 * self.bar :]
        earlier = [history[:, (2 - k) * bar + 1 :][:, : last.shape[1]] for k in (1, 2)]  # events t - bar, t - 2 bar
        same = [history[:, (2 - k) * bar :][:, : last.shape[1]] == last for k in (1, 2)]
        x = self.event(last) + self.beat(at % bar) + torch.stack(same, -1).to(self.repeats.dtype) @ self.repeats
        return x + sum(embed(events) for embed, events in zip(self.lookback, earlier, strict=True))


class State(NamedTuple):
    """The state of B melodies, which `next` changes in place."""

    history: Tensor
    """int64 (B, 2 bar), the tokens read last."""
    at: Tensor
    """int64 (B, 1), the index in its text of the token that is read next; negative for padding."""
    hidden: Tensor
    cell: Tensor
    """(layers, B, width) of the LSTM."""
    outputs: Tensor
    """(B, attention, width), the outputs of the LSTM for the tokens read last."""


class MelodyRNN(nn.Module):
    """A model of the next event of a melody, trained by maximum likelihood: the attention RNN of Magenta's melody_rnn.

    What the LSTM gives for the last event attends to the last `attention` outputs, its own among them, and both together give the
    logits. Differences from Waite (2016): attention is by scaled dot products, and is not fed back to the next step's input, so
    that training runs all steps in one call; an event that repeats has no label of its own, so that probabilities of events sum
    to 1.

    Args:
        field: field of the data; must be `tokens`.
        vocab_size: number of token ids.
        length: tokens of a window in training, which begins at a bar line.
        bar: tokens of a bar.
        width: of embeddings and LSTM.
        layers: of the LSTM.
        attention: number of outputs that are attended to.
        dropout: of features, between layers, and of what the logits are made from.

    Raises UserError for another field or data without tokens.
    """

    field = "tokens"
    bound = "exact"
    """The kind of likelihood that `log_prob` returns: ln p itself, not a bound."""
    first = 1
    """The id that stands in for an empty prompt: the end of a note, for silence."""

    def __init__(
        self,
        field: str,
        vocab_size: int,
        length: int,
        bar: int = 16,
        width: int = 128,
        layers: int = 2,
        attention: int = 40,
        dropout: float = 0.0,
    ):
        super().__init__()
        if field != self.field or vocab_size is None:
            raise UserError(f"a MelodyRNN takes {self.field}, but this data has {field}: choose melodies with data=")
        at_least(bar, 1, "model.bar")
        self.vocab_size, self.length, self.attention, self.dropout = vocab_size, length, attention, dropout
        self.features = Features(vocab_size, width, bar)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.out, self.head = nn.Linear(2 * width, width), nn.Linear(width, vocab_size)

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name; an LSTM is one call already."""
        return {"features": self.features}

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, vocab_size) of the event after each of `tokens` int64 (B, T)."""
        at = torch.arange(tokens.shape[1], device=tokens.device)
        history = F.pad(tokens, (self.features.reach - 1, 0), value=self.features.none)
        outputs, _ = self.lstm(self.drop(self.features(history, at[None])))
        distance = at[:, None] - at
        return self.attend(outputs, outputs, (distance >= 0) & (distance < self.attention))

    def attend(self, last: Tensor, outputs: Tensor, mask: Tensor) -> Tensor:
        """Return logits from outputs (B, T, width) that attend to outputs (B, T', width) where `mask` (B or 1, T, T') is true."""
        found = F.scaled_dot_product_attention(self.query(last), self.key(outputs), outputs, mask)
        hidden = torch.tanh(self.out(self.drop(torch.cat([last, found], -1))))
        return self.head(self.drop(hidden))

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to x of any shape."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def nats(self, batch: Batch) -> Tensor:
        """Return -ln p of each token of batch[tokens] (B, T) given those before it, 0 outside of `mask`: (B, T - 1)."""
        return nats_of(self.logits(batch[self.field][:, :-1]), batch)

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean of `nats` over all targets, 0 if there are none; the weight is their number."""
        return mean_loss(self.nats(batch), batch)

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p(tokens after the first | first) in nats, (B,), over `mask`; exact, so the seed is not used."""
        return -self.nats(batch).sum(1)

    def start(self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None) -> State:
        """Return the state of `batch` texts before their first token; see `Autoregressive.start`."""
        weight, layers, width = self.head.weight, self.lstm.num_layers, self.lstm.hidden_size
        history = torch.full((batch, self.features.reach - 1), self.features.none, device=weight.device)
        at = history.new_zeros(batch, 1) if pad is None else -pad[:, None].clone()
        hidden, cell = (weight.new_zeros(layers, batch, width) for _ in range(2))
        return State(history, at, hidden, cell, weight.new_zeros(batch, self.attention, width))

    def next(self, tokens: Tensor, state: State) -> Tensor:
        """Read tokens int64 (B, T) and return logits float32 (B, vocab_size) of the token after them."""
        slots = torch.arange(1 - self.attention, 1, device=tokens.device)
        for token in tokens.split(1, 1):
            real = state.at >= 0  # (B, 1)
            token = token.where(real, self.features.none)
            history = torch.cat([state.history, token], 1)
            x = self.features(history.where(real, 0), state.at.clamp_min(0))
            output, new = self.lstm(x, (state.hidden, state.cell))
            for held, value in zip((state.hidden, state.cell), new, strict=True):
                held.copy_(value.where(real, 0))
            state.history.copy_(history[:, 1:])
            state.outputs.copy_(torch.cat([state.outputs[:, 1:], output], 1))
            state.at.add_(1)
        seen = slots > -state.at  # of the outputs, those of real tokens
        return self.attend(state.outputs[:, -1:], state.outputs, (seen | (slots == 0))[:, None])[:, 0].float()

    def reorder(self, state: State, index: Tensor) -> None:
        """Let row i of a state continue row index[i], int64 (B,)."""
        for held, rows in zip(state, (0, 0, 1, 1, 0), strict=True):
            held.copy_(held.index_select(rows, index))

    def fix(self, state: State) -> bool:
        """Return True: every step is the same work on the same memory."""
        return True
