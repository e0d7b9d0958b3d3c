"""Operations of products as they run: those of PyTorch, and those of the attention kernels."""

from __future__ import annotations

import functools
import importlib
import re
from collections import Counter
from typing import Any, NamedTuple, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longread.ops import attention
from longread.ops.attention.reference import visible

PLAIN = ("mm", "addmm", "bmm", "baddbmm")
FUSED = "_scaled_dot_product_flash_attention_for_cpu"
SUSPICIOUS = re.compile("mm|mv|dot|matmul|linear|conv|attention|einsum|outer|kron|bilinear")
"""In names of operations that may be products."""


class Kernel(NamedTuple):
    """Products that an attention kernel makes of each pair of a query and a key that it sees."""

    once: int
    """What the derivation needs and no other kernel has made."""
    own: int
    """More of them where a key has tangents: those of the mini-batch itself."""
    again: int
    """Scores and the like computed again, and sums that are not joined."""
    own_again: int


KERNELS = {
    "forward": Kernel(2, 0, 0, 0),  # S, o
    "query_gradient": Kernel(2, 0, 1, 0),  # do vᵀ, dq; S
    "key_gradient": Kernel(2, 0, 2, 0),  # dk, dv; S, do vᵀ
    "tangent": Kernel(2, 2, 1, 0),  # a kᵀ, (P∘Ṡ) v, q bᵀ, P c; S
    "query_second": Kernel(0, 2, 4, 1),  # dS b, do cᵀ; S, a kᵀ, do vᵀ, Ŝ k, q bᵀ
    "key_second": Kernel(2, 0, 4, 2),  # dSᵀ a, v̂; S, a kᵀ, do vᵀ, Ŝᵀ q, q bᵀ, do cᵀ
}


class Products(TorchDispatchMode):
    """Counts them; one that may be a product and is not known raises: it would count for nothing.

    Args:
        kernels: attention takes the way that it takes on a GPU, up to the launch of a kernel, which is counted instead.
    """

    def __init__(self, *, kernels: bool = False) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        """`products`, and `again` what an attention computes again for its own sake; 2 for each multiply-add."""
        self._kernels, self._patch = kernels, pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        if self._kernels:
            module = importlib.import_module("longread.ops.attention.triton")
            self._patch.setattr(attention, "fusible", lambda *tensors: True)
            self._patch.setattr(module, "_new", torch.zeros_like)  # no kernel fills it
            self._patch.setattr(module, "_row_of", lambda query: torch.zeros_like(query[..., 0]))
            self._patch.setattr(module._Problem, "launch", lambda *args, **options: self._launched(*args, **options))
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, space = func.overloadpacket.__name__, func.namespace
        if name.removesuffix("_") in PLAIN:
            left, right = args[-2:]
            self.flops["products"] += 2 * left.numel() * right.shape[-1]
        elif name in (FUSED, f"{FUSED}_backward"):
            backward = name != FUSED
            pairs = _pairs(*args[backward : 2 + backward], (kwargs or {}).get("attn_mask"))
            self._count(Kernel(4, 0, 1, 0) if backward else Kernel(2, 0, 0, 0), pairs, 0)
        elif space == "longread" and self._kernels:
            pass  # its kernels are counted as they are launched
        elif space not in ("aten", "prims", "profiler") or SUSPICIOUS.search(name):
            raise AssertionError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))

    def _count(self, kernel: Kernel, pairs: int, own: int) -> None:
        """Args: pairs: times the head dim; own: those of them whose keys have tangents."""
        self.flops["products"] += 2 * (kernel.once * pairs + kernel.own * own)
        self.flops["again"] += 2 * (kernel.again * pairs + kernel.own_again * own)

    def _launched(
        self,
        problem: Any,
        kernel: Any,
        by_query: list[Tensor],
        by_key: list[Tensor | None],
        statistics: list[Any],
        past_alone: bool | None = None,
        **constants: Any,
    ) -> None:
        if constants.get("BOUNDED"):
            return  # one of two that are launched: the other answers
        name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
        own, past = (by_query[0].numel() // problem.T * pairs for pairs in _seen(*problem[:3]))
        tangents = by_key[2] is not None and name in ("tangent", "query_second", "key_second")
        pairs = own + past if past_alone is None else past if past_alone else own
        self._count(KERNELS[name], pairs, own if tangents else 0)


@functools.cache
def _seen(T: int, P: int, window: int) -> tuple[int, int]:
    """Pairs of a query with its own mini-batch's keys, and with the past's."""
    mask = visible(T, P + T, window, torch.device("cpu"))
    return int(mask[:, P:].sum()), int(mask[:, :P].sum())


def _pairs(query: Tensor, key: Tensor, mask: Tensor | None) -> int:
    """Of a query and a key that it sees, times the head dim."""
    T, H = query.shape[-2:]
    if mask is None:
        seen = visible(T, key.shape[-2], None, query.device)
    else:
        seen = mask if not mask.is_floating_point() else mask == 0
    return int(seen.expand(*query.shape[:-1], key.shape[-2]).sum()) * H
