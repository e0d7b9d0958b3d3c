"""The rules of the inner step by the names that configs give them. `register_inner_optimizer` is the one place to add
another.

A rule has no state of its own: what it needs follows from the fast weights, their gradient, the rate and the clip. So
a session is its fast weights and window whatever the rule is, and every rule can be run again when a gradient is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longread.config import INNER_OPTIMIZERS, UserError
from longread.ops.clipped_sgd import clipped_sgd, clipped_sgd_, clipped_sgd_and_cast


class Rule(Protocol):
    """New weights from old ones and their gradients: tensors [B, ...] of the same shapes and types, each sequence for
    itself. `lr` may be a tensor []; `clip` None means no clipping. Differentiable by autograd, finite at a gradient of
    zero, and without a look at a value on the host, which no CUDA graph could replay."""

    def __call__(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float | Tensor, clip: float | None
    ) -> Sequence[Tensor]: ...


class Update(NamedTuple):
    """The result of a step."""

    weights: tuple[Tensor, ...]
    grad_norm: Tensor
    """Of each sequence's gradient as it came, [B]; it takes no part in differentiation."""
    refused: Tensor | None
    """Which sequences the guard kept from the step, bool [B]; None: those that `ops.clipped_sgd.refused` finds by their
    norms, or there is no guard."""
    working: tuple[Tensor, ...] | None = None
    """The weights in the type of the products, where that was asked for and cost no pass of its own."""


class InnerOptimizer:
    """The step by a rule, with the guard of reading (see `longread.ops.clipped_sgd`) around it."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        lr: float | Tensor,
        clip: float | None,
        max_step_norm: Tensor | None = None,
        group: ProcessGroup | None = None,
        working: torch.dtype | None = None,
    ) -> Update:
        """Args as in `clipped_sgd`; `working` is the type of the products, where such come next. Raises `ValueError` if
        the rule gives other shapes or types than it was given, and `UserError` for a `group`: only clipped SGD takes
        norms over ranks."""
        if group is not None:
            raise UserError(
                f"the inner optimizer {self.rule} cannot be divided among {group.size()} ranks; use inner.optimizer "
                "sgd, or parallelism.state 1"
            )
        wide = [g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)]
        new = tuple(self.rule(weights, wide, lr=lr, clip=clip))
        if [(w.shape, w.dtype) for w in new] != [(w.shape, w.dtype) for w in weights]:
            raise ValueError(f"the inner optimizer {self.rule} gives other shapes or types than those of the weights")
        norm = _norm(wide)
        if max_step_norm is None:
            return Update(new, norm, None)
        length = _norm([after - before for after, before in zip(new, weights, strict=True)])
        refused = ~(norm.isfinite() & (length <= max_step_norm))
        kept = [
            torch.where(refused.view(-1, *[1] * (w.dim() - 1)), w, after) for w, after in zip(weights, new, strict=True)
        ]
        return Update(tuple(kept), norm, refused)

    def step_(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        working: Sequence[Tensor],
        *,
        lr: float | Tensor,
        clip: float | None,
        max_step_norm: Tensor | None = None,
    ) -> Update:
        """The same in place, where nothing will be differentiated; args as in `clipped_sgd_`."""
        found = self.step(weights, gradients, lr=lr, clip=clip, max_step_norm=max_step_norm)
        for weight, copy, new in zip(weights, working, found.weights, strict=True):
            weight.copy_(new)
            copy.copy_(new)
        return found


class _ClippedSGD(InnerOptimizer):
    """The paper's, by kernels of its own."""

    def __init__(self) -> None:
        super().__init__(lambda weights, gradients, *, lr, clip: clipped_sgd(weights, gradients, lr=lr, clip=clip)[0])

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        lr: float | Tensor,
        clip: float | None,
        max_step_norm: Tensor | None = None,
        group: ProcessGroup | None = None,
        working: torch.dtype | None = None,
    ) -> Update:
        if working not in (None, weights[0].dtype) and max_step_norm is None:
            new, copies, norm = clipped_sgd_and_cast(weights, gradients, working, lr=lr, clip=clip, group=group)
            return Update(new, norm, None, copies)
        return Update(
            *clipped_sgd(weights, gradients, lr=lr, clip=clip, max_step_norm=max_step_norm, group=group), None
        )

    def step_(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        working: Sequence[Tensor],
        *,
        lr: float | Tensor,
        clip: float | None,
        max_step_norm: Tensor | None = None,
    ) -> Update:
        norm = clipped_sgd_(weights, gradients, working, lr=lr, clip=clip, max_step_norm=max_step_norm)
        return Update(tuple(weights), norm, None)


CLIPPED_SGD: InnerOptimizer = _ClippedSGD()
_BY_NAME: dict[str, InnerOptimizer] = {"sgd": CLIPPED_SGD}


def register_inner_optimizer(name: str, rule: Rule) -> None:
    """Lets `InnerConfig(optimizer=name)` mean a step by `rule`, for training, reading and their CUDA graphs alike.

    Register it before a model, a run or a session that names it is opened. Raises `UserError` if the name is taken.
    """
    if name in _BY_NAME and _BY_NAME[name].rule is not rule:
        raise UserError(f"there is an inner optimizer {name!r} already; give yours another name")
    _BY_NAME.setdefault(name, InnerOptimizer(rule))
    INNER_OPTIMIZERS.add(name)


def optimizer_named(name: str) -> InnerOptimizer:
    """The step that a config names; configs name only what there is."""
    return _BY_NAME[name]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of each sequence, over all tensors: [B], without a gradient."""
    squares = [torch.linalg.vecdot(x, x) for x in (tensor.detach().flatten(1) for tensor in tensors)]
    return torch.stack(squares).sum(0).sqrt()
