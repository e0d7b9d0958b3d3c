"""Attention that sees, beside its window, a few older tokens, each query told which: one dense problem with a mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from longread.ops.attention.banded import attend
from longread.ops.attention.reference import visible, with_past


class Further(NamedTuple):
    """Keys and values of older tokens, each [B, G, n, H]."""

    key: Tensor
    value: Tensor
    visible: Tensor
    """Which of them each query sees, bool [B, T, n]."""


def further_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    window: int | None,
    further: Further,
) -> Tensor:
    """The contract of `longread.ops.attention.attention`, at order 1; memory T × (n + P + T)."""
    T = query.shape[-2]
    key, value = with_past(key, value, past)
    inside = visible(T, key.shape[-2], window, query.device).expand(len(query), -1, -1)
    mask = torch.cat((further.visible, inside), dim=-1).unsqueeze(1)
    return attend(query, torch.cat((further.key, key), dim=-2), torch.cat((further.value, value), dim=-2), mask)
