"""Sums over ranks inside a differentiated computation, differentiable as often as wanted.

A hidden dimension is divided: each rank computes with its part and adds its share of the result. `enter` and `leave`
stand before and behind such a computation, each the derivative of the other (f and g of Megatron-LM,
https://arxiv.org/abs/1909.08053, section 3):

    enter    forward: x, the same on all ranks         backward: cotangents, summed over ranks
    leave    forward: shares, summed over ranks        backward: the cotangent, the same on all ranks

So outside of them all ranks have the same values and the same cotangents, whatever the order of the derivative. All
ranks of a group compute the same graph; its collectives then come in the same order on each.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def enter(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, which is the same on all ranks of `group`, for a computation of which each rank does a part."""
    return _Enter.apply(x, group)


def leave(share: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks of `group` of what each has computed, in the type of `share`."""
    return _Leave.apply(share, group)


def part(weight: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of `weight`, contiguous: one of as many equal ones along `dim` as `group` has ranks.

    Its gradient is zero elsewhere, and multiplied by the number of ranks. So the mean of the gradients over ranks is
    that of the whole weight, as it is for a weight that every rank uses whole. Differentiable once.
    """
    return _Part.apply(weight, dim, group)


def summed(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the ranks of `group`, in place, outside of differentiation; without a group x as it is."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _Leave.apply(dx, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return summed(share.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Enter.apply(dy, ctx.group), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.shape, ctx.dim, ctx.ranks = weight.shape, dim, group.size()
        size = weight.shape[dim] // ctx.ranks
        ctx.first = group.rank() * size
        return weight.narrow(dim, ctx.first, size).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpart: Tensor) -> tuple[Tensor, None, None]:
        whole = dpart.new_zeros(ctx.shape)
        torch.mul(dpart, ctx.ranks, out=whole.narrow(ctx.dim, ctx.first, dpart.shape[ctx.dim]))
        return whole, None, None
