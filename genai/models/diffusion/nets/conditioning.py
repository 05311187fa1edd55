"""How the time, a label and a caption enter a network that denoises."""

from torch import Tensor, nn

from genai.nn.attention import Context


def add_conditions(
    emb: Tensor,
    of_label: nn.Module | None,
    label: Tensor | None,
    of_summary: nn.Module | None,
    states: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Context | None]:
    """An embedding of the time (B, width) with those of label and caption, where a network has them, activated; and what it
    attends to."""
    if of_label is not None:
        emb = emb + of_label(label)
    context = None
    if of_summary is not None:
        assert states is not None and real is not None
        context, emb = Context(states, real), emb + of_summary(states[:, 0])
    return nn.functional.silu(emb), context
