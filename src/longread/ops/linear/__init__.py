"""Matrix products with a weight that is used many times before its gradient is due.

The scan over mini-batches multiplies with the same slow weights at every step, twice where the step is
differentiated. Left to autograd, each use casts the weight and adds its own gradient to a running sum. Here the weight
is cast once, every use leaves a pair of factors, and one long product makes the gradient (order 2). A bias takes no
part in the gradient of x, so only the uses themselves leave something for it: a row, summed in float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import needed_inputs


class _Left(NamedTuple):
    """The factors that the uses of a weight leave for its gradient."""

    pairs: list[tuple[Tensor, Tensor]]
    """Factors [rows, in] and [rows, out]."""
    sums: list[Tensor]
    """Gradients of the bias, [out]; float32 or wider."""


class SharedWeight:
    """A weight [out, in] in the type of the products; multiply with it as often as needed in one graph.

    Args:
        bias: [out], added to every product.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        self._left = _Left([], [])
        self._cast, self._bias = _Share.apply(weight, bias, dtype, self._left)

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias for x [..., in] of the type given above: [..., out]."""
        return _SharedProduct.apply(x, self._cast, self._bias, self._left)


class _Share(torch.autograd.Function):
    """The casts of weight and bias. All uses run before this backward does, and hand it gradients only by `_Left`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, left: _Left
    ) -> tuple[Tensor, Tensor | None]:
        ctx.left, ctx.dtypes = left, (weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return _cast(weight, dtype), None if bias is None else _cast(bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, unused: Tensor | None, unused_bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        pairs, sums = ctx.left
        dtype, bias_dtype = ctx.dtypes
        if not pairs:
            return unused, unused_bias, None, None
        x, dy = (torch.cat(factors) if len(factors) > 1 else factors[0] for factors in zip(*pairs, strict=True))
        pairs.clear()
        dbias = torch.stack(sums).sum(0).to(bias_dtype) if sums else None
        sums.clear()
        if dtype != x.dtype and x.is_cuda:
            return torch.mm(dy.t(), x, out_dtype=dtype), dbias, None, None
        return torch.mm(dy.t(), x).to(dtype), dbias, None, None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype != dtype else x.view_as(x)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _SharedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: _Left) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.left, ctx.has_bias = left, bias is not None
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, *_ = needed_inputs(
            ctx
        )  # weight and bias come from one `_Share`, which needs both or none
        if needs_weight:
            if torch.is_grad_enabled():
                raise RuntimeError("the gradient of a shared weight is taken once, at the end; it cannot be recorded")
            ctx.left.pairs.append((_flat(x), _flat(dy)))
            if ctx.has_bias:
                wide = torch.promote_types(dy.dtype, torch.float32)
                ctx.left.sums.append(_flat(dy).sum(0, dtype=wide))
        return _Back.apply(dy, weight, ctx.left) if needs_x else None, None, None, None


class _Back(torch.autograd.Function):
    """dx = dy W, whose own derivative multiplies with W again."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, weight: Tensor, left: _Left) -> Tensor:
        ctx.save_for_backward(dy, weight)
        ctx.left = left
        return dy @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, None, None]:
        dy, weight = ctx.saved_tensors
        needs_dy, needs_weight = needed_inputs(ctx)
        if needs_weight:
            ctx.left.pairs.append((_flat(u), _flat(dy)))
        return torch.nn.functional.linear(u, weight) if needs_dy else None, None, None
