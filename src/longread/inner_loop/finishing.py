"""The step on a mini-batch that was complete before the last of its targets, the token after it, had come: as where a
text is written, or read in pieces. Where there are CUDA graphs it becomes one, once such steps recur.
"""

from __future__ import annotations

from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop.captured import captured_step
from longread.inner_loop.optimizers import Update, optimizer_named
from longread.inner_loop.step import Carry, Recorded, inner_step, matrices
from longread.model import Transformer, can_capture


def finish(
    model: Transformer,
    carry: Carry,
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    position: int,
    start: int | Tensor,
    inner: InnerConfig,
    max_step_norm: Tensor | None,
    run: Recorded | None = None,
) -> Update:
    """Takes the step; the keys and values of the mini-batch are those that it has been read with.

    Args:
        carry: the fast weights, and the window before the mini-batch.
        hidden: of the mini-batch, [B, M, D], from `Transformer.lower`.
        targets, mask: [B, M]; the mask is True where a target counts.
        position: of the first token, in the first sequence; `start` says it of each.
        max_step_norm: guards the step (`longread.inner_loop.step.step_norm_limit`); None: every step is taken.
        run: what `longread.inner_loop.step.recorded` made of the same mini-batch and carry, if anything.
    """
    guard, reader = max_step_norm is not None, None
    if can_capture(model.device):
        reader = captured_step(model, len(hidden), position, inner, guard=guard)
    if reader is not None:
        return reader.step(carry, hidden, targets, mask, position=position, start=start, max_step_norm=max_step_norm)
    step = inner_step(
        model,
        carry,
        hidden,
        targets,
        mask,
        start=start,
        lr=inner.lr,
        clip=inner.clip,
        order=0,
        surprise=inner.surprise,
        max_step_norm=max_step_norm,
        optimizer=optimizer_named(inner.optimizer),
        run=run,
    )
    return Update(tuple(matrices(step.fast)), step.grad_norm, step.refused)
