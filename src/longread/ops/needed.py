"""Which gradients a backward pass really asks for."""

from typing import Any

import torch


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
