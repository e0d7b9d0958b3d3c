"""Which gradients a backward pass really asks for, and where two of them meet.

An op and its derivative both read x, and PyTorch would add what comes back to x from each of them in a pass of its own.
So an op gives x out once more, beside its result, and its derivative reads that. What is left there in the second
backward pass is then an adjoint of the op's own output, which the op adds where it makes its own gradient of x.
"""

from typing import Any

import torch
from torch import Tensor


def handed_on(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs of a custom Function as more outputs of it, for the Function of its derivative; for its `forward` to call
    once. Those that take no gradient still take none.
    """
    outputs = tuple(x.view_as(x) for x in inputs)
    ctx.mark_non_differentiable(*(y for x, y in zip(inputs, outputs, strict=True) if not x.requires_grad))
    return outputs


def needed_inputs(ctx: Any) -> tuple[bool, ...]:
    """For each tensor input of a custom Function, whether the backward pass that is running wants its gradient.

    The tensors must be the first inputs of the Function.

    `ctx.needs_input_grad` says which inputs could receive one. The inner gradient asks for the fast weights
    alone, so without this every slow matrix on its way would get a product that nobody reads.
    """
    return tuple(
        could and _will_run(edge[0]) for could, edge in zip(ctx.needs_input_grad, ctx.next_functions, strict=False)
    )


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined]
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for: PyTorch will not say, but it is wanted
        return True
