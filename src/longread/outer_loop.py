"""The outer loop: losses whose gradient trains the model (paper Eq. 3, 4 and 6), and memory for it.

`end_to_end_loss` is the loss of the model as it learns; its gradient runs through every inner step. Two other
meta-gradients are there to be compared with the exact one: "first-order" holds each inner gradient constant,
and `truncate_after=n` cuts the chain of steps every n, keeping only W_i = W_0 + constant across the cut.

The exact gradient would need the activations of all n = T / M steps at once. A segment of steps can instead
keep only the carry at its start and be run again, with a graph, when its gradient is due:

    none   one segment with its graph kept       memory n · activations                     no extra work
    sqrt   segments of √n steps                  √n · carries + √n · activations            one more forward
    step   segments of one step                  n · carries + 1 · activations              one more forward

A carry is the fast weights plus the suffix's window. `auto` takes the first of the three that fits in memory.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longread.config import MetaGradient, ModelConfig, Recompute
from longread.inner_loop.step import Carry, Scan, from_matrices, matrices, mini_batch_loss, scan
from longread.model import FastWeights, Past, Transformer


class OuterLoss(NamedTuple):
    """A loss to differentiate, and how it came about."""

    loss: Tensor
    """Mean over sequences of the mean over mini-batches, []. Only this takes part in differentiation."""
    nll: Tensor
    """−log p of every target, masked or not, [B, T]."""
    mini_batch_loss: Tensor
    """Mean over the unmasked targets of each mini-batch, [B, T / M]."""
    inner_grad_norm: Tensor
    """Norm of each inner gradient before clipping, [B, T / M − 1]; [B, 0] for the static loss."""


def static_loss(model: Transformer, input_ids: Tensor, target_ids: Tensor, loss_mask: Tensor) -> OuterLoss:
    """The ordinary loss: every token is scored with the initial weights (Eq. 4).

    Args:
        input_ids, target_ids: int64 [B, T], T a multiple of M.
        loss_mask: bool [B, T], True where the target counts.
    """
    M = model.config.mini_batch_size
    _check_length(input_ids, M)
    lower, upper = model.empty_pasts(input_ids.shape[0])
    hidden, _ = model.lower(input_ids, lower, start=0)
    output, _ = model.upper(hidden, None, upper, start=0, order=1)
    nll = model.token_losses(output, target_ids)
    loss = mini_batch_loss(nll.unflatten(1, (-1, M)), loss_mask.unflatten(1, (-1, M)))
    return OuterLoss(loss.mean(), nll.detach(), loss.detach(), nll.new_empty(nll.shape[0], 0))


def end_to_end_loss(
    model: Transformer,
    input_ids: Tensor,
    target_ids: Tensor,
    loss_mask: Tensor,
    *,
    inner_lr: float | Tensor,
    inner_clip: float | None,
    meta_gradient: MetaGradient = "exact",
    truncate_after: int | None = None,
    recompute: Recompute = "auto",
) -> OuterLoss:
    """The loss of the model as it learns, mean_i loss_i(W_{i−1}), differentiable through the inner steps (Eq. 3, 6).

    Args:
        input_ids, target_ids: int64 [B, T], T a multiple of M; each sequence starts from W_0 and learns alone.
        loss_mask: bool [B, T], True where the target counts, in the inner loss as in the outer one.
        inner_lr: rate; a tensor [] where it changes under a CUDA graph.
        inner_clip: largest gradient norm of one sequence; None: no clipping.
        meta_gradient: "exact", or "first-order", which holds each inner gradient constant.
        truncate_after: cut the chain of steps every so many steps; None: never.
        recompute: which activations are kept, as explained at the top of this file; all give the same gradient.
    """
    M = model.config.mini_batch_size
    _check_length(input_ids, M)
    B, count = input_ids.shape[0], input_ids.shape[1] // M
    if recompute == "auto":
        recompute = choose_recompute(
            model.config, batch_size=B, context_length=count * M, itemsize=model.dtype.itemsize, device=model.device
        )
    longest = {"none": count, "sqrt": math.ceil(math.sqrt(count)), "step": 1}[recompute]
    horizon = truncate_after or count

    def run(first: int, last: int, hidden: Tensor, carry: Carry, order: int) -> Scan:
        part = slice(first * M, last * M)
        return scan(
            model,
            carry,
            hidden,
            target_ids[:, part],
            loss_mask[:, part],
            start=first * M,
            lr=inner_lr,
            clip=inner_clip,
            order=order,
            last_step=last < count,
        )

    lower_pasts, upper_pasts = model.empty_pasts(B)
    hidden, _ = model.lower(input_ids, lower_pasts, start=0)
    initial = model.initial_fast_weights(B)
    carry = Carry(initial, upper_pasts)
    order = 2 if meta_gradient == "exact" else 1
    parameters = [p for p in model.upper_parameters() if p.requires_grad]
    parts: list[Scan] = []
    first = 0
    while first < count:
        if first and first % horizon == 0:
            carry = _cut(carry, initial)
        last = min(first + longest, (first // horizon + 1) * horizon, count)
        part = hidden[:, first * M : last * M]
        if recompute == "none":
            parts.append(run(first, last, part, carry, order))
        else:
            parts.append(_run_again(functools.partial(run, first, last), order, parameters, part, carry))
        carry, first = parts[-1].carry, last
    losses = torch.cat([part.mini_batch_loss for part in parts], dim=1)
    nll, norms = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("nll", "grad_norm"))
    return OuterLoss(losses.mean(), nll.detach(), losses.detach(), norms.detach())


def choose_recompute(
    config: ModelConfig,
    *,
    batch_size: int,
    context_length: int,
    itemsize: int,
    device: torch.device,
    budget: int | None = None,
) -> Literal["none", "sqrt", "step"]:
    """The schedule that recomputes least among those that fit, or the leanest if none does.

    Args:
        itemsize: bytes of a number that products run in.
        budget: bytes for the graph of one outer step; None: 60 % of what is free on the device now.
    """
    count = context_length // config.mini_batch_size
    activations, carry = step_bytes(config, batch_size, itemsize, kernels=device.type == "cuda")
    root = math.ceil(math.sqrt(count))
    need = {"none": count * activations, "sqrt": root * (activations + carry), "step": activations + count * carry}
    limit = 0.6 * _free_bytes(device) if budget is None else budget
    schedules: tuple[Literal["none", "sqrt", "step"], ...] = ("none", "sqrt", "step")
    fitting = [schedule for schedule in schedules if need[schedule] <= limit]
    return fitting[0] if fitting else min(schedules, key=need.__getitem__)


def step_bytes(config: ModelConfig, batch_size: int, itemsize: int, *, kernels: bool = False) -> tuple[int, int]:
    """Bytes that one inner step keeps for its exact gradient, and bytes of a carry: estimates, for `choose_recompute`.

    The graph of a suffix block holds about 44 D + 20 F numbers a token, measured on CPUs, and the fast weights three
    times: old, new and their gradient. Attention keeps its scores five times; with `kernels`, on a GPU, about 24 D
    numbers a token instead, the weights in the type of the products, and the logits once.
    """
    B, M, D, F = batch_size, config.mini_batch_size, config.width, config.mlp_hidden
    S, attentions = config.num_suffix_blocks, max(0, config.num_suffix_blocks - 1)
    scores = 24 * D if kernels else 5 * config.num_heads * (config.window_size + M)
    logits = config.vocab_size if kernels else 0
    weights = B * config.num_fast_weights * 4
    activations = B * M * (S * (44 * D + 20 * F) + attentions * scores + logits) * itemsize
    past = attentions * 2 * B * config.window_size * D * itemsize
    return activations + (1 if kernels else 3) * weights, weights + past


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS does not say what is free


def _check_length(input_ids: Tensor, mini_batch_size: int) -> None:
    T = input_ids.shape[1]
    if T == 0 or T % mini_batch_size:
        raise ValueError(f"{T} tokens are no multiple of the mini-batch of {mini_batch_size}; pad or cut the sequences")


def _cut(carry: Carry, initial: FastWeights) -> Carry:
    """The same values, with nothing left of their history but W_i = W_0 + constant."""
    kept = [w0 + (w - w0).detach() for w, w0 in zip(matrices(carry.fast), matrices(initial), strict=True)]
    return Carry(from_matrices(kept), tuple(past.detach() for past in carry.pasts))


def _flatten(carry: Carry) -> list[Tensor]:
    return [*matrices(carry.fast), *(x for past in carry.pasts for x in past)]


def _unflatten(flat: Sequence[Tensor], num_fast: int) -> Carry:
    pasts = flat[num_fast:]
    return Carry(from_matrices(flat[:num_fast]), tuple(Past(*pasts[i : i + 2]) for i in range(0, len(pasts), 2)))


def _run_again(
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
    num_fast = len(matrices(carry.fast))
    loss, nll, norms, *after = _Segment.apply(
        run, order, num_fast, len(parameters), hidden, *_flatten(carry), *parameters
    )
    return Scan(_unflatten(after, num_fast), nll, loss, norms)


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, Carry, int], Scan],
        order: int,
        num_fast: int,
        num_parameters: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.order, ctx.num_fast, ctx.num_parameters = run, order, num_fast, num_parameters
        ctx.save_for_backward(*tensors)
        hidden, *flat = (x.detach() for x in tensors[: len(tensors) - num_parameters])
        result = run(hidden, _unflatten(flat, num_fast), 0)
        ctx.mark_non_differentiable(result.nll, result.grad_norm)
        return result.mini_batch_loss, result.nll, result.grad_norm, *_flatten(result.carry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, d_nll: Tensor, d_norm: Tensor, *d_carry: Tensor) -> tuple[Any, ...]:
        split = len(ctx.saved_tensors) - ctx.num_parameters
        inputs, parameters = ctx.saved_tensors[:split], ctx.saved_tensors[split:]
        hidden, *flat = inputs = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            result = ctx.run(hidden, _unflatten(flat, ctx.num_fast), ctx.order)
        outputs = result.mini_batch_loss, *_flatten(result.carry)
        due = [(out, d) for out, d in zip(outputs, (d_loss, *d_carry), strict=True) if out.requires_grad]
        gradients = torch.autograd.grad(
            [out for out, _ in due], (*inputs, *parameters), [d for _, d in due], allow_unused=True
        )
        return None, None, None, None, *gradients
