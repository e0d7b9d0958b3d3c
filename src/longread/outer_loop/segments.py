"""Several inner steps that keep only their inputs, and run again when their gradient is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from longread.inner_loop.step import Carry, Kind, Scan, from_matrices, kind_of, matrices
from longread.model import Past
from longread.model.transformer import RECOMPUTE


def segment_ends(count: int, again: int, cut: int) -> list[int]:
    """Where the segments of `count` steps end, of which the first `again` run again: there, and every `cut` steps.

    Those that run again are few and of even length: none is longer than the rest, whose graph is gone by then.
    """
    pieces = -(-again // max(1, count - again))
    ends = {again * (piece + 1) // pieces for piece in range(pieces)}
    return sorted(ends | set(range(cut, count, cut)) | {count})


def _flatten(carry: Carry) -> list[Tensor]:
    return [*matrices(carry.fast), *(x for past in carry.pasts for x in past)]


def _unflatten(flat: Sequence[Tensor], num_fast: int, kind: Kind) -> Carry:
    pasts = flat[num_fast:]
    return Carry(from_matrices(flat[:num_fast], kind), tuple(Past(*pasts[i : i + 2]) for i in range(0, len(pasts), 2)))


def run_again(
    run: Callable[[Tensor, Carry, int], Scan],
    order: int,
    parameters: Sequence[nn.Parameter],
    hidden: Tensor,
    carry: Carry,
) -> Scan:
    """`run(hidden, carry, order)` that keeps only its inputs until its gradient is due.

    The graph of an inner step contains a backward pass of its own, which saved-tensor hooks, and hence
    `torch.utils.checkpoint`, do not serve; so the second run is a Function here.
    """
    num_fast, kind = len(matrices(carry.fast)), kind_of(carry.fast)
    loss, nll, norms, output, *after = _Segment.apply(
        run, order, num_fast, kind, len(parameters), hidden, *_flatten(carry), *parameters
    )
    # An inner gradient asks for the fast weights: nothing else may come from their node, or it would look wanted too.
    after[:num_fast] = [x.view_as(x) for x in after[:num_fast]]
    return Scan(_unflatten(after, num_fast, kind), nll, loss, norms, output)


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, Carry, int], Scan],
        order: int,
        num_fast: int,
        kind: Kind,
        num_parameters: int,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.run, ctx.order, ctx.num_fast, ctx.kind, ctx.num_parameters = run, order, num_fast, kind, num_parameters
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        hidden, *flat = (x.detach() for x in tensors[: len(tensors) - num_parameters])
        result = run(hidden, _unflatten(flat, num_fast, kind), 0)
        output = result.output
        ctx.mark_non_differentiable(*(x for x in (result.nll, result.grad_norm, output) if x is not None))
        return result.mini_batch_loss, result.nll, result.grad_norm, output, *_flatten(result.carry)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_loss: Tensor | None, d_nll: None, d_norm: None, d_output: None, *d_carry: Tensor | None
    ) -> tuple[Any, ...]:
        split = len(ctx.saved_tensors) - ctx.num_parameters
        kept, parameters = ctx.saved_tensors[:split], ctx.saved_tensors[split:]
        needs = ctx.needs_input_grad[-len(ctx.saved_tensors) :]  # a window that begins at a cut is constant
        hidden, *flat = (x.detach().requires_grad_(need) for x, need in zip(kept, needs, strict=False))
        with record_function(RECOMPUTE), torch.enable_grad():
            result = ctx.run(hidden, _unflatten(flat, ctx.num_fast, ctx.kind), ctx.order)
        outputs = result.mini_batch_loss, *_flatten(result.carry)
        # what nobody looks at, such as a carry that ends at a cut, gets no gradient, not one of zeros to go through
        due = [
            (out, d) for out, d in zip(outputs, (d_loss, *d_carry), strict=True) if out.requires_grad and d is not None
        ]
        inputs = hidden, *flat, *parameters
        gradients = iter(
            torch.autograd.grad(
                [out for out, _ in due], [x for x in inputs if x.requires_grad], [d for _, d in due], allow_unused=True
            )
        )
        return None, None, None, None, None, *(next(gradients) if x.requires_grad else None for x in inputs)
