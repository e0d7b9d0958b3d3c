"""The outer loop's AdamW: decoupled decay of every parameter, gains included, and clipping by global norm.

Where rows of parameters are divided among ranks (`longread.parallel`), it steps those of this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from longread.config import OptimizerConfig, UserError
from longread.model import Transformer
from longread.parallel import DividedRows

_EMBEDDING = "embedding.weight"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def freeze_below(model: Transformer, trained_blocks: int | None) -> None:
    """Leaves a gradient to the last `trained_blocks` blocks and the final norm alone, or to everything."""
    if trained_blocks is None:
        return
    model.requires_grad_(False)
    for module in (*list(model.blocks)[-trained_blocks:], model.final_norm):
        module.requires_grad_(True)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, all that get a gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, config: OptimizerConfig, rows: DividedRows | None = None) -> torch.optim.AdamW:
    """AdamW over all parameters of `model` that are trained, or over `rows` of them; `update` sets its rate."""
    named = dict(trained_parameters(model) if rows is None else rows.own)
    undecayed = [] if config.decay_embedding else [_EMBEDDING]
    undecayed += [f"{place}.{name}" for place, m in model.named_modules() for name in getattr(m, "undecayed", ())]
    exempt = [named.pop(name) for name in undecayed if name in named]
    groups = [
        {"params": list(named.values()), "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients together, []."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, clip: float | None) -> None:
    """Scales all gradients by clip / norm if `norm`, theirs together, exceeds `clip`. No epsilon."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if clip is not None and gradients and norm > clip:
        torch._foreach_mul_(gradients, clip / norm)  # a launch for each would leave a GPU waiting


def update(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    config: OptimizerConfig,
    step: int,
    norm: Tensor,
    rows: DividedRows | None = None,
    *,
    part: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
) -> float:
    """One clipped step from the gradients in place, which are gone afterwards; returns the rate it used.

    `step` counts from 0; `norm` is that of the gradients together. With `rows`, which hold the reduced gradients, all
    ranks take it together, and each has the whole new parameters in the end. `part` is entered around "update" and
    "gather".
    """
    lr = config.lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    with part("update"):
        clip_gradients(model.parameters() if rows is None else rows.own.values(), norm, config.clip)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if rows is not None:
        with part("gather"):
            rows.gather()
        rows.clear()
    return lr


def optimizer_tensors(rows: DividedRows, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The moments of all rows that have been stepped, as `parameter.moment`."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in rows.own.items()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def restore_optimizer(
    rows: DividedRows, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Puts back what `optimizer_tensors` gave. Raises `UserError` if the moments are not of these rows."""
    for name, parameter in rows.own.items():
        moments = {moment: tensors[key] for moment in _MOMENTS if (key := f"{name}.{moment}") in tensors}
        if not moments:  # it has never had a gradient
            continue
        if len(moments) < len(_MOMENTS) or moments["exp_avg"].shape != parameter.shape:
            raise UserError(f"{where} has no moments for {name}; it is the optimizer of another model")
        optimizer.state[parameter] = {
            moment: tensor.to(parameter.device, torch.float32 if moment == "step" else parameter.dtype)
            for moment, tensor in moments.items()
        }
