"""The definition."""

from torch import Tensor


def reference_likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `longread.ops.likeliest.likeliest`."""
    ids = logits.argmax(-1)
    return ids, logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
