"""The way time, label, speaker and caption enter a denoising network."""

from torch import Tensor, nn

from genai.nn.attention import Context


def embedding(kinds: int | None, width: int) -> nn.Embedding | None:
    """Return the embedding of `kinds` labels or speakers and, as its last row, of the null; None for None."""
    return None if kinds is None else nn.Embedding(kinds + 1, width)


def add_conditions(
    emb: Tensor,
    label_embedding: nn.Module | None,
    label: Tensor | None,
    speaker_embedding: nn.Module | None,
    speaker: Tensor | None,
    summary_embedding: nn.Module | None,
    states: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Context | None]:
    """Add the embeddings of label, speaker and caption summary to the time embedding emb (B, width), and activate it.

    Returns the embedding (B, width), and the `Context` for cross-attention, None without a caption.
    """
    if label_embedding is not None:
        emb = emb + label_embedding(label)
    if speaker_embedding is not None:
        emb = emb + speaker_embedding(speaker)
    context = None
    if summary_embedding is not None:
        assert states is not None and real is not None
        context, emb = Context(states, real), emb + summary_embedding(states[:, 0])
    return nn.functional.silu(emb), context
