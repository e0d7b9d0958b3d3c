"""Meta-gradients of a tiny model by one process, for tests of ranks that compute them together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from longread.config import InnerConfig, MetaGradient, OptimizerConfig, Recompute, RunConfig
from longread.config.run import Loss
from longread.data import Batch
from longread.model import Transformer
from longread.train import accumulate_gradient
from tests import tiny

B, T, M = 4, 64, 16
NOISE = 2.0
"""How many times one process's own error in float32 that of several may be."""


@dataclass(frozen=True)
class Case:
    """How a gradient is computed."""

    recompute: Recompute = "none"
    clip: float | None = 0.05
    """Inner gradients of this model and text have norms of 0.1 to 0.4."""
    meta_gradient: MetaGradient = "exact"
    truncate_after: int | None = None
    micro_batch_size: int | None = None
    loss: Loss = "end-to-end"


ESSENTIAL = (
    Case("none", clip=None),
    Case("none", meta_gradient="first-order"),
    Case("sqrt", clip=0.05),
    Case("step", clip=1.0, truncate_after=2),
    Case("blocks", loss="static"),
)
"""Every schedule, loss and kind of meta-gradient, with and without a clip."""
OTHERS = (
    Case("none", clip=1.0),
    Case("blocks", clip=0.2),
    Case("step", clip=0.2),
    Case("sqrt", clip=0.2, micro_batch_size=1),
)
CASES = (*ESSENTIAL, *OTHERS)


@dataclass(frozen=True)
class Found:
    """A gradient with the loss that it is of."""

    gradients: dict[str, Tensor]
    loss: float
    inner_grad_norm: Tensor

    def error(self, of: Found) -> float:
        """The worst relative L2 error of a parameter's gradient."""
        if self.gradients.keys() != of.gradients.keys():
            raise AssertionError(f"gradients of {sorted(self.gradients)}, not of {sorted(of.gradients)}")
        pairs = [(self.gradients[name].double(), exact.double()) for name, exact in of.gradients.items()]
        return max(((found - exact).norm() / exact.norm()).item() for found, exact in pairs)


def make(dtype: torch.dtype, device: str = "cpu") -> Transformer:
    """The same weights in each type, away from where gains are 1. bfloat16: of the products, over float32."""
    sizes = {"width": 32, "mini_batch_size": M, "window_size": 24, "mlp_hidden": 40, "fast_hidden": 24}
    model = tiny.make(dtype=torch.float32, **sizes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if dtype == torch.bfloat16:
        model.compute_dtype, dtype = dtype, torch.float32
    return model.to(device, dtype)


def batch() -> Batch:
    """Four texts with holes, one of them without any target: ranks count differently."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(19, (B, T + 1), generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.1
    mask[3] = False
    return Batch(tokens[:, :-1], tokens[:, 1:], mask)


def share(rank: int, size: int) -> Batch:
    """Of one of `size` ranks, as `Sampler.batch` gives it."""
    return Batch(*(tensor[rank * B // size : (rank + 1) * B // size] for tensor in batch()))


def config(model: Transformer, case: Case) -> RunConfig:
    found = RunConfig(
        name="case",
        model=model.config,
        optimizer=OptimizerConfig(lr=0.1),
        inner=InnerConfig(lr=0.7, clip=case.clip),
        loss=case.loss,
        meta_gradient=case.meta_gradient,
        truncate_after=case.truncate_after,
        context_length=T,
        batch_size=12,
        steps=1,
        recompute=case.recompute,
    )
    return dataclasses.replace(found, micro_batch_size=case.micro_batch_size)


@cache
def alone(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Found:
    """By one process."""
    model = make(dtype, device)
    found = accumulate_gradient(model, config(model, case), batch().to(device), inner_lr=0.7)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Found(gradients, found.loss.item(), found.inner_grad_norm)
