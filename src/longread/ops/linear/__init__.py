"""Matrix products in the type of x with weights of a wider type, and with one that is used many times.

The scan over mini-batches multiplies with the same slow weights at every step, twice where the step is
differentiated. Left to autograd, each use casts the weight and adds its own gradient to a running sum. Here the weight
is cast once, every use leaves a pair of factors, and one long product makes the gradient (order 2). A bias takes no
part in the gradient of x, so only the uses themselves leave something for it: a row, summed in float32.

Weights that meet the same x can be one: a mini-batch is short, and one wide product fills a GPU better than three.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import needed_inputs


def linear(x: Tensor, weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor] | None = None) -> Tensor:
    """x Wᵀ + bias for x [..., in], in its type: [..., out]; differentiable twice.

    The gradient of a weight of another type is made in that type, not rounded to that of x before.

    Args:
        weight: [out, in], or several with one `in`, which become one, the first on top.
        bias: [out], one for each weight.
    """
    weights, biases = _several(weight), _several(bias)
    if casts_for_a_gradient(x, weights[0]):
        return _WiderProduct.apply(x, *weights, *biases, len(weights))
    whole, *rest = (
        torch.cat([part.to(x.dtype) for part in parts]) if len(parts) > 1 else parts[0].to(x.dtype)
        for parts in (weights, biases)
        if parts
    )
    return torch.nn.functional.linear(x, whole, *rest)


def casts_for_a_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether a product casts the weight and will be differentiated."""
    return weight.dtype != x.dtype and weight.requires_grad and torch.is_grad_enabled()


class _WiderProduct(torch.autograd.Function):
    """(x, W, …, bias, …) -> the product with all weights"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors_and_count: Any) -> Tensor:
        *tensors, count = tensors_and_count
        weights, biases = tensors[:count], tensors[count:]
        cast = _cast(weights, x.dtype)
        ctx.save_for_backward(x, cast, *weights)
        ctx.bias_dtype = biases[0].dtype if biases else None
        return torch.nn.functional.linear(x, cast, _cast(biases, x.dtype) if biases else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, cast, *weights = ctx.saved_tensors
        heights = [len(weight) for weight in weights]
        needs_x, *needs = needed_inputs(ctx)
        recorded = torch.is_grad_enabled()
        dx = dweight = dbias = None
        if needs_x:
            dx = dy @ (torch.cat([weight.to(x.dtype) for weight in weights]) if recorded else cast)
        if any(needs[: len(weights)]):
            dweight = _weight_gradient(_flat(x), _flat(dy), weights[0].dtype, recorded=recorded)
        if any(needs[len(weights) :]):
            dbias = _flat(dy).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        has_bias = ctx.bias_dtype is not None
        return dx, *_apart(dweight, heights), *(_apart(dbias, heights) if has_bias else ()), None


def _apart(whole: Tensor | None, heights: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(heights) if whole is None else whole.split(heights)


def _weight_gradient(x: Tensor, dy: Tensor, dtype: torch.dtype, *, recorded: bool = False) -> Tensor:
    """dyᵀ x in the given type, [out, in]."""
    if dtype != x.dtype and x.is_cuda and not recorded:  # PyTorch has no derivative of this
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return torch.mm(dy.t(), x).to(dtype)


class _Left(NamedTuple):
    """The factors that the uses of a weight leave for its gradient."""

    pairs: list[tuple[Tensor, Tensor]]
    """Factors [rows, in] and [rows, out]."""
    sums: list[Tensor]
    """Gradients of the bias, [out]; float32 or wider."""


class SharedWeight:
    """A weight [out, in] in the type of the products; multiply with it as often as needed in one graph.

    Args:
        weight: or several [out, in] with one `in`, which become one, the first on top.
        bias: [out], added to every product; one for each weight.
    """

    def __init__(
        self,
        weight: Tensor | Sequence[Tensor],
        dtype: torch.dtype,
        bias: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        weights, biases = _several(weight), _several(bias)
        self._left = _Left([], [])
        self._cast, self._bias = _Share.apply(dtype, self._left, len(weights), *weights, *biases)

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias for x [..., in] of the type given above: [..., out]."""
        return _SharedProduct.apply(x, self._cast, self._bias, self._left)


def _several(x: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    if x is None:
        return ()
    return (x,) if isinstance(x, Tensor) else tuple(x)


class _Share(torch.autograd.Function):
    """The casts of weights and biases, each as one. All uses run before this backward does, and hand it gradients only
    by `_Left`."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, left: _Left, count: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        weights, biases = tensors[:count], tensors[count:]
        ctx.left, ctx.dtypes = left, (weights[0].dtype, biases[0].dtype if biases else None)
        ctx.heights = [len(weight) for weight in weights]
        ctx.set_materialize_grads(False)
        return _cast(weights, dtype), _cast(biases, dtype) if biases else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, unused: Tensor | None, unused_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _Share._gradients(ctx, unused, unused_bias)
        has_bias = ctx.dtypes[1] is not None
        parts = [part for whole in gradients[: 1 + has_bias] for part in _apart(whole, ctx.heights)]
        return None, None, None, *parts

    @staticmethod
    def _gradients(ctx: Any, unused: Tensor | None, unused_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias, each as one."""
        pairs, sums = ctx.left
        dtype, bias_dtype = ctx.dtypes
        if not pairs:
            return unused, unused_bias
        x, dy = (torch.cat(factors) if len(factors) > 1 else factors[0] for factors in zip(*pairs, strict=True))
        pairs.clear()
        dbias = torch.stack(sums).sum(0).to(bias_dtype) if sums else None
        sums.clear()
        return _weight_gradient(x, dy, dtype), dbias


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One on top of the other, in the given type."""
    first, *others = tensors
    if not others:
        return first.to(dtype) if first.dtype != dtype else first.view_as(first)
    heights = [len(x) for x in tensors]
    whole = first.new_empty(sum(heights), *first.shape[1:], dtype=dtype)
    for place, x in zip(whole.split(heights), tensors, strict=True):
        place.copy_(x)
    return whole


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
