"""The loss of a mini-batch, one step on it, and the scan over mini-batches (paper Eq. 2 and 5).

Training, evaluation and serving all take this one step; `order` says what may be differentiated afterwards:
0 nothing (reading), 1 the losses but not the steps (first-order meta-gradient), 2 everything (exact).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from longread.inner_loop.optimizers import CLIPPED_SGD, InnerOptimizer
from longread.model import FastWeights, Past, Transformer
from longread.model.layers import JoinedSwiGLU, SwiGLU

INNER_STEP = "inner step"
"""Its range in a profile."""


class Carry(NamedTuple):
    """What one mini-batch hands to the next: the fast weights, and the window of `Transformer.upper`."""

    fast: FastWeights
    pasts: tuple[Past, ...]
    working: tuple[Tensor, ...] | None = None
    """The fast weights in the type of the products, in the order of `matrices`, where a step has just made them."""


class Step(NamedTuple):
    """One mini-batch read: the weights after it, and how it was scored with the weights before."""

    fast: FastWeights
    own: tuple[Past, ...]
    """The mini-batch's own keys and values, for `Transformer.advance`."""
    nll: Tensor
    """−log p of each target, [B, M]."""
    loss: Tensor
    """Mean over the unmasked targets, [B]; that of the step is weighted where `surprise` says so."""
    grad_norm: Tensor
    """Norm of each sequence's gradient before clipping, [B]."""
    output: Tensor
    """Of `Transformer.upper`, [B, M, D]."""
    refused: Tensor | None
    """As in `Update`."""
    working: tuple[Tensor, ...] | None
    """As in `Carry`."""


class Scan(NamedTuple):
    """Several mini-batches read in turn."""

    carry: Carry
    nll: Tensor
    """[B, T]"""
    mini_batch_loss: Tensor
    """[B, T / M]"""
    grad_norm: Tensor
    """[B, steps]"""
    output: Tensor | None = None
    """Of `Transformer.upper`, [B, T, D], where asked for."""


def mini_batch_loss(nll: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of nll [..., M] over the targets that count; 0 where none does. Returns [...]."""
    return (nll * loss_mask).sum(-1) / loss_mask.sum(-1).clamp(min=1e-10)


def surprise_weights(nll: Tensor, loss_mask: Tensor, exponent: float) -> Tensor:
    """What each target weighs in the inner loss: nll^α, held constant, with a mean of 1 over the targets that count.

    Where no target cost anything all weigh 0. Returns [..., M] for nll and mask [..., M].
    """
    cost = nll.detach().clamp(min=0) * loss_mask
    tiny = torch.finfo(cost.dtype).tiny
    weights = (cost / cost.amax(-1, keepdim=True).clamp(min=tiny)) ** exponent * loss_mask  # no power overflows
    return weights / mini_batch_loss(weights, loss_mask).unsqueeze(-1).clamp(min=tiny)


def matrices(fast: FastWeights) -> list[Tensor]:
    """All fast weights in one list: gate, up and down of the lowest block first."""
    return [matrix for block in fast for matrix in block]


Kind = type[SwiGLU] | type[JoinedSwiGLU]


def kind_of(fast: FastWeights) -> Kind:
    """How the matrices of a block are held."""
    return type(fast[0]) if fast else SwiGLU


def from_matrices(flat: Sequence[Tensor], kind: Kind = SwiGLU) -> FastWeights:
    """The inverse of `matrices`."""
    count = len(kind._fields)
    return tuple(kind(*flat[i : i + count]) for i in range(0, len(flat), count))


def step_norm_limit(model: Transformer) -> Tensor:
    """‖W_0‖, []: a step longer than all that the weights were before reading is an explosion, and is not taken.

    Where all of W_0 is 0 that says nothing, and every step of finite length may be taken.
    """
    weights = matrices(model.initial_fast_weights(1))
    size = torch.stack([w.detach().norm() for w in weights]).norm()
    return size + (size == 0).to(size.dtype) * torch.finfo(size.dtype).max  # kernels that reading has loaded anyway


class Recorded(NamedTuple):
    """`Transformer.upper` over one mini-batch, with a graph that leads from `working` to `output`."""

    working: tuple[Tensor, ...]
    """The fast weights in the type of the products, in the order of `matrices`."""
    output: Tensor
    own: tuple[Past, ...]
    inputs: tuple[Tensor, ...]
    """The hidden states and fast weights that it was made of."""
    version: int
    """How often the model's parameters had been changed in place."""

    def is_of(self, model: Transformer, fast: FastWeights, hidden: Tensor) -> bool:
        """Whether these tensors are its inputs, and the model is still as it was."""
        same = all(a is b for a, b in zip(self.inputs, (hidden, *matrices(fast)), strict=True))
        return same and self.version == _version(model)


def recorded(model: Transformer, carry: Carry, hidden: Tensor, *, start: int | Tensor) -> Recorded:
    """Runs a mini-batch whose targets are not all known yet, for an `inner_step` of order 0 to come. Args as there."""
    with torch.enable_grad():
        working = tuple(w.detach().requires_grad_().to(model.dtype) for w in matrices(carry.fast))
        output, own = model.upper(hidden, from_matrices(working), carry.pasts, start=start, order=1)
    return Recorded(working, output, own, (hidden, *matrices(carry.fast)), _version(model))


def _version(model: Transformer) -> int:
    return sum(parameter._version for parameter in model.upper_parameters())


class InnerGradient(NamedTuple):
    """One mini-batch scored, and the gradient of its loss; fields as in `Step`."""

    gradients: tuple[Tensor, ...]
    """With respect to the fast weights, in the order of `matrices`."""
    own: tuple[Past, ...]
    nll: Tensor
    loss: Tensor
    output: Tensor


def inner_gradient(
    model: Transformer,
    working: Sequence[Tensor],
    pasts: Sequence[Past],
    hidden: Tensor,
    target_ids: Tensor,
    loss_mask: Tensor,
    *,
    start: int | Tensor,
    order: int,
    surprise: float = 0.0,
    group: ProcessGroup | None = None,
    run: Recorded | None = None,
    kind: Kind = SwiGLU,
) -> InnerGradient:
    """Scores one mini-batch and takes the gradient of its loss with respect to the fast weights.

    It holds everything else constant: the hidden states from below, the other parameters, and the keys and values
    of earlier mini-batches, which lie outside its path. Args as in `inner_step`; `working` are the fast weights in
    the type of the products, held in the given way, and require a gradient; those of `run`, if that is given.
    """
    with torch.enable_grad():
        if run is None:
            fast = from_matrices(working, kind)
            output, own = model.upper(hidden, fast, pasts, start=start, order=max(1, order), group=group)
        else:
            output, own = run.output, run.own
        nll = model.token_losses(output, target_ids)
        loss = mini_batch_loss(nll, loss_mask)
        learned = mini_batch_loss(nll * surprise_weights(nll, loss_mask, surprise), loss_mask) if surprise else loss
        gradients = torch.autograd.grad(
            learned.sum(), working, create_graph=order == 2, retain_graph=order > 0 or run is not None
        )
    if order == 0:
        output, nll, loss = output.detach(), nll.detach(), loss.detach()
        own = tuple(made.detach() for made in own)
    return InnerGradient(gradients, own, nll, loss, output)


def inner_step(
    model: Transformer,
    carry: Carry,
    hidden: Tensor,
    target_ids: Tensor,
    loss_mask: Tensor,
    *,
    start: int | Tensor,
    lr: float | Tensor,
    clip: float | None,
    order: int,
    surprise: float = 0.0,
    max_step_norm: Tensor | None = None,
    optimizer: InnerOptimizer = CLIPPED_SGD,
    group: ProcessGroup | None = None,
    run: Recorded | None = None,
    cast: bool = False,
) -> Step:
    """Scores one mini-batch with the weights of `carry`, then takes one step on it.

    With order 2 the step stays differentiable with respect to all that `inner_gradient` holds constant.

    Args:
        hidden: [B, M, D], from `Transformer.lower`.
        target_ids, loss_mask: [B, M]; the mask is True where the target counts.
        start: position of the first token.
        lr, clip: of the step; of SGD rate, and largest norm per sequence (None: no clipping).
        order: 0, 1 or 2, as explained at the top of this file.
        surprise: exponent of `surprise_weights`, constants at every order; 0: all targets weigh the same.
        max_step_norm: guards the step at order 0 (see `step_norm_limit`).
        group: as in `Transformer.upper`.
        run: what `recorded` made of the same mini-batch and carry, at order 0. It may serve again.
        cast: whether another mini-batch follows, and wants the new weights in the type of the products too.
    """
    weights, kind = matrices(carry.fast), kind_of(carry.fast)
    weights = [w if order and w.requires_grad else w.detach().requires_grad_() for w in weights]
    # the gradient is taken where the products are, in their type; the step keeps the precision of the weights
    working: Sequence[Tensor]
    if run is not None:
        working = run.working
    elif carry.working is not None:
        working = [w if order and w.requires_grad else w.detach().requires_grad_() for w in carry.working]
    else:
        with torch.enable_grad():
            working = [w.to(model.dtype) for w in weights]
    found = inner_gradient(
        model,
        working,
        carry.pasts,
        hidden,
        target_ids,
        loss_mask,
        start=start,
        order=order,
        surprise=surprise,
        group=group,
        run=run,
        kind=kind,
    )
    if order == 0:
        weights = [w.detach() for w in weights]
    new, norm, refused, copies = optimizer.step(
        weights,
        found.gradients,
        lr=lr,
        clip=clip,
        max_step_norm=max_step_norm,
        group=group,
        working=model.dtype if cast else None,
    )
    return Step(from_matrices(new, kind), found.own, found.nll, found.loss, norm, found.output, refused, copies)


def scan(
    model: Transformer,
    carry: Carry,
    hidden: Tensor,
    target_ids: Tensor,
    loss_mask: Tensor,
    *,
    start: int,
    lr: float | Tensor,
    clip: float | None,
    order: int,
    surprise: float = 0.0,
    last_step: bool = True,
    optimizer: InnerOptimizer = CLIPPED_SGD,
    outer_mask: Tensor | None = None,
    outputs: bool = False,
    group: ProcessGroup | None = None,
) -> Scan:
    """Reads T tokens, a multiple of M, mini-batch by mini-batch.

    Args as in `inner_step`, over [B, T]. `last_step` False leaves out the step on the last mini-batch, whose
    weights nobody would use when the sequence ends there. `outer_mask` says which targets count in the losses that
    are returned, where these are not those of the steps.
    """
    M = model.config.mini_batch_size
    count = hidden.shape[1] // M
    nll, loss, grad_norm, kept = [], [], [], []
    outer = loss_mask if outer_mask is None else outer_mask
    # cut at once: the gradient of a slice is as large as all that it was cut from
    parts = zip(*(x.split(M, dim=1) for x in (hidden, target_ids, loss_mask, outer)), strict=True)
    with model.sharing_weights():
        for i, (*inputs, counts) in enumerate(parts):
            if i == count - 1 and not last_step:
                first, last = start + i * M, min(order, 1)
                fast = carry.fast if carry.working is None else from_matrices(carry.working, kind_of(carry.fast))
                output, _ = model.upper(inputs[0], fast, carry.pasts, start=first, order=last, group=group)
                nll.append(model.token_losses(output, inputs[1]))
                loss.append(mini_batch_loss(nll[-1], counts))
            else:
                with record_function(INNER_STEP):
                    step = inner_step(
                        model,
                        carry,
                        *inputs,
                        start=start + i * M,
                        lr=lr,
                        clip=clip,
                        order=order,
                        surprise=surprise,
                        optimizer=optimizer,
                        group=group,
                        cast=i < count - 1,
                    )
                pasts = model.advance(carry.pasts, step.own, model.num_lower_attentions)
                carry = Carry(step.fast, pasts, step.working)
                nll.append(step.nll)
                output = step.output
                loss.append(step.loss if outer_mask is None else mini_batch_loss(step.nll, counts))
                grad_norm.append(step.grad_norm)
            kept += [output] if outputs else []
    norms = torch.stack(grad_norm, dim=1) if grad_norm else hidden.new_empty(hidden.shape[0], 0)
    return Scan(
        carry, torch.cat(nll, dim=1), torch.stack(loss, dim=1), norms, torch.cat(kept, dim=1) if outputs else None
    )
