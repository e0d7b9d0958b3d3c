"""The loss of the model as it learns, and the static loss.

Two other meta-gradients are there to be compared with the exact one: "first-order" holds each inner gradient constant,
and `truncate_after=n` cuts the chain of steps every n, keeping only W_i = W_0 + constant across the cut. What no fast
weight has touched is not cut: the first suffix attention looks back across.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from longread.config import Loss, MetaGradient, Recomputation, Recompute, UserError, recomputation
from longread.inner_loop.optimizers import CLIPPED_SGD, optimizer_named
from longread.inner_loop.step import Carry, Scan, from_matrices, kind_of, matrices, mini_batch_loss, scan
from longread.model import FastWeights, Transformer
from longread.outer_loop.memory import choose_recompute
from longread.outer_loop.segments import run_again, segment_ends
from longread.parallel import is_divided


class OuterLoss(NamedTuple):
    """A loss to differentiate, and how it came about."""

    loss: Tensor
    """`mean_loss` of the mini-batches, []. Only this takes part in differentiation."""
    nll: Tensor
    """−log p of every target, masked or not, [B, T]."""
    mini_batch_loss: Tensor
    """Mean over the unmasked targets of each mini-batch, [B, T / M]; 0 where there is none."""
    inner_grad_norm: Tensor
    """Norm of each inner gradient before clipping, [B, T / M − 1]; [B, 0] for the static loss."""
    output: Tensor | None = None
    """The input of `Transformer.logits`, [B, T, D], where asked for; differentiable as the loss is, unless
    inner steps run again for the gradient: then it is a constant."""


def mean_loss(losses: Tensor, loss_mask: Tensor) -> Tensor:
    """The loss of a batch: the mean over sequences of the mean over mini-batches, of those that have a target, [].

    0 if none has. A mini-batch of padding is no mini-batch that cost nothing.

    Args:
        losses: of each mini-batch, [B, T / M].
        loss_mask: bool [B, T], True where a target counts.
    """
    counts = loss_mask.unflatten(1, (losses.shape[1], -1)).any(-1)
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1).to(losses.dtype)
    return (losses * share).sum() / num_counted(loss_mask)


def num_counted(loss_mask: Tensor) -> Tensor:
    """Over how many sequences of a batch its loss is a mean: those of `loss_mask` [B, T] with a target; 1 for none."""
    return loss_mask.any(1).sum().clamp(min=1)


def static_loss(
    model: Transformer,
    input_ids: Tensor,
    target_ids: Tensor,
    loss_mask: Tensor,
    *,
    recompute: Recompute = "auto",
    outputs: bool = False,
) -> OuterLoss:
    """The ordinary loss: every token is scored with the initial weights (Eq. 4).

    Args:
        input_ids, target_ids: int64 [B, T], T a multiple of M.
        loss_mask: bool [B, T], True where the target counts.
        recompute: which activations are kept (see `longread.outer_loop`); all schedules give the same gradient.
        outputs: whether to keep the outputs of all tokens.
    """
    M = model.config.mini_batch_size
    _check_length(input_ids, M)
    model.config.check_nothing_kept("training")
    _refuse_divided(model)
    again = _settled(recompute, "static", model, input_ids).blocks
    lower, upper = model.empty_pasts(input_ids.shape[0])
    hidden, _ = model.lower(input_ids, lower, start=0, recompute=again)
    output, _ = model.upper(hidden, None, upper, start=0, order=1, recompute=again)
    nll = model.token_losses(output, target_ids)
    loss = mini_batch_loss(nll.unflatten(1, (-1, M)), loss_mask.unflatten(1, (-1, M)))
    norms, kept = nll.new_empty(nll.shape[0], 0), output if outputs else None
    return OuterLoss(mean_loss(loss, loss_mask), nll.detach(), loss.detach(), norms, kept)


def end_to_end_loss(
    model: Transformer,
    input_ids: Tensor,
    target_ids: Tensor,
    loss_mask: Tensor,
    *,
    inner_lr: float | Tensor,
    inner_clip: float | None,
    inner_optimizer: str = "sgd",
    inner_surprise: float = 0.0,
    meta_gradient: MetaGradient = "exact",
    truncate_after: int | None = None,
    recompute: Recompute = "auto",
    inner_mask: Tensor | None = None,
    outputs: bool = False,
) -> OuterLoss:
    """The loss of the model as it learns, mean_i loss_i(W_{i−1}), differentiable through the inner steps (Eq. 3, 6).

    Where `model.state_group` is set, its ranks call this together with the same arguments. Each holds its part of the
    fast weights and gets the whole result; gradients are right in the mean over ranks, see `ops.collective.part`.

    Args:
        input_ids, target_ids: int64 [B, T], T a multiple of M; each sequence starts from W_0 and learns alone.
        loss_mask: bool [B, T], True where the target counts, in the outer loss and, without `inner_mask`, in the inner
            one.
        inner_lr: rate; a tensor [] where it changes under a CUDA graph.
        inner_clip: largest gradient norm of one sequence; None: no clipping.
        inner_optimizer: rule of the steps, as `InnerConfig.optimizer` names it.
        inner_surprise: exponent of `InnerConfig.surprise`. The weights of targets are constants for the outer gradient
            too, and the outer loss has none.
        meta_gradient: "exact", or "first-order", which holds each inner gradient constant.
        truncate_after: cut the chain of steps every so many steps; None: never.
        recompute: which activations are kept (see `longread.outer_loop`); all schedules give the same gradient.
        inner_mask: bool [B, T], True where the target counts in the inner loss: all that is read, where only answers
            are to be learned by heart.
        outputs: whether to keep the outputs of all tokens.
    """
    M = model.config.mini_batch_size
    _check_length(input_ids, M)
    model.config.check_nothing_kept("training")
    _refuse_divided(model)
    if meta_gradient not in get_args(MetaGradient):
        raise ValueError(f"meta_gradient is {meta_gradient!r}; it must be one of {', '.join(get_args(MetaGradient))}")
    if truncate_after is not None and truncate_after < 1:
        raise ValueError(f"truncate_after is {truncate_after}; it must be at least 1, or None")
    B, count = input_ids.shape[0], input_ids.shape[1] // M
    again = _settled(recompute, "end-to-end", model, input_ids)
    horizon, group = truncate_after or count, model.state_group

    def run(first: int, last: int, hidden: Tensor, carry: Carry, order: int) -> Scan:
        part = slice(first * M, last * M)
        return scan(
            model,
            carry,
            hidden,
            target_ids[:, part],
            (loss_mask if inner_mask is None else inner_mask)[:, part],
            start=first * M,
            lr=inner_lr,
            clip=inner_clip,
            order=order,
            surprise=inner_surprise,
            last_step=last < count,
            optimizer=optimizer_named(inner_optimizer),
            outer_mask=None if inner_mask is None else loss_mask[:, part],
            outputs=outputs,
            group=group,
        )

    lower_pasts, upper_pasts = model.empty_pasts(B)
    hidden, _ = model.lower(input_ids, lower_pasts, start=0, recompute=again.blocks, keep_attention=not again.attention)
    # one wide product fills a GPU better than two; only this rule does not care how matrices are cut
    joined = model.casts and optimizer_named(inner_optimizer) is CLIPPED_SGD
    initial = (model.joined_initial_fast_weights if joined else model.initial_fast_weights)(B, group)
    carry = Carry(initial, upper_pasts)
    order = 2 if meta_gradient == "exact" else 1
    parameters = [p for p in model.upper_parameters() if p.requires_grad]
    parts: list[Scan] = []
    first = 0
    for last in segment_ends(count, again.steps, horizon):
        if first and first % horizon == 0:
            carry = _cut(carry, initial)
        part = hidden[:, first * M : last * M]
        # The gradient of the last steps is due first: their graph goes before others run again.
        if first >= again.steps:
            parts.append(run(first, last, part, carry, order))
        else:
            parts.append(run_again(functools.partial(run, first, last), order, parameters, part, carry))
        carry, first = parts[-1].carry, last
    losses = torch.cat([part.mini_batch_loss for part in parts], dim=1)
    nll, norms = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("nll", "grad_norm"))
    kept = [part.output for part in parts if part.output is not None]
    output = torch.cat(kept, dim=1) if kept else None
    return OuterLoss(mean_loss(losses, loss_mask), nll.detach(), losses.detach(), norms.detach(), output)


def _settled(recompute: Recompute, loss: Loss, model: Transformer, input_ids: Tensor) -> Recomputation:
    B, T = input_ids.shape
    if recompute == "auto":
        recompute = choose_recompute(
            model.config, loss, batch_size=B, context_length=T, itemsize=model.dtype.itemsize, device=model.device
        )
    return recomputation(recompute, model.config, loss, T)


def _check_length(input_ids: Tensor, mini_batch_size: int) -> None:
    T = input_ids.shape[1]
    if T == 0 or T % mini_batch_size:
        raise ValueError(f"{T} tokens are no multiple of the mini-batch of {mini_batch_size}; pad or cut the sequences")


def _refuse_divided(model: Transformer) -> None:
    """Only the prefix may gather parameters as it goes. A part used as if it were whole would raise somewhere below, or
    lose its gradient: segments do not tell a parameter that gets none from one that is out of sight."""
    seen: list[nn.Module] = [model.embedding, *model.suffix, model.final_norm, *([model.head] if model.head else [])]
    if any(is_divided(parameter) for module in seen for parameter in module.parameters()):
        raise UserError("the model's parameters are divided among ranks; compute its loss by longread.train.meta_step")


def _cut(carry: Carry, initial: FastWeights) -> Carry:
    """The same values, with nothing left of their history but W_i = W_0 + constant."""
    kept = [w0 + (w - w0).detach() for w, w0 in zip(matrices(carry.fast), matrices(initial), strict=True)]
    return Carry(from_matrices(kept, kind_of(initial)), tuple(past.detach() for past in carry.pasts))
