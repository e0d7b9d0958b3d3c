"""No speed on red: what is about to be timed must be right first.

A small network with the head dimension of the timed one runs on the device, in the timed precision, and is compared
with float64 on the CPU. In bfloat16 an error may be twice that of plain PyTorch in bfloat16 on the CPU; in float32
there is a fixed bound. What a single timed case must fulfil besides stands with its measurement.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longread.bench.machine import precision_on
from longread.config import InnerConfig, ModelConfig, Recompute
from longread.inner_loop import begin, read
from longread.inner_loop.graphs import GraphRefused
from longread.model import Transformer, initialize
from longread.outer_loop import end_to_end_loss, static_loss

FLOAT32_BOUND = 1e-4
TIMES_REFERENCE = 2.0
_VOCABULARY, _WIDTH, _MINI_BATCH, _TOKENS = 1000, 256, 128, 512


class GateFailed(RuntimeError):
    """A result is wrong, so its time is not taken. The message says what and by how much."""


class GateResult(NamedTuple):
    """The result of a gate."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {'right' if self.passed else 'RED'}, {self.detail}"


def small_config(method: str, head_dim: int) -> ModelConfig:
    """Four blocks whose attention looks back further than a mini-batch and less far than the text."""
    heads = max(2, _WIDTH // head_dim)
    return ModelConfig(
        vocab_size=_VOCABULARY,
        width=heads * head_dim,
        num_blocks=4,
        num_heads=heads,
        mlp_hidden=_WIDTH,
        window_size=_MINI_BATCH + 64,
        mini_batch_size=_MINI_BATCH,
        num_suffix_blocks=2 if method == "e2e" else 0,
        attention="full" if method == "full" else "window",
    )


def gradients(
    config: ModelConfig, device: str | torch.device, dtype: torch.dtype, recompute: Recompute = "none"
) -> list[Tensor]:
    """Every outer gradient of a small training step, on the CPU; bfloat16 is the type of the products only."""
    model = Transformer(config)
    initialize(model, seed=1)
    model = model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.bfloat16:
        model.compute_dtype = dtype
    tokens = _tokens(2, _TOKENS + 1).to(device)
    batch = tokens[:, :-1], tokens[:, 1:], torch.ones(2, _TOKENS, dtype=torch.bool, device=device)
    if config.num_suffix_blocks:
        loss = end_to_end_loss(model, *batch, inner_lr=1.0, inner_clip=1.0, recompute=recompute).loss
    else:
        loss = static_loss(model, *batch, recompute=recompute).loss
    return [g.double().cpu() for g in torch.autograd.grad(loss, list(model.parameters()))]


def scores(config: ModelConfig, device: str | torch.device, dtype: torch.dtype, weights: torch.dtype) -> list[Tensor]:
    """The NLL of every token of a small text, on the CPU, read in `dtype` with weights rounded to another type."""
    model = Transformer(config)
    initialize(model, seed=1)
    model = model.to(weights).to(device, dtype).requires_grad_(False)
    tokens = _tokens(1, 2 * _TOKENS + 2).to(device)
    return [read(model, begin(model), tokens, inner=InnerConfig()).nll[:, 1:].double().cpu()]


def check_gradients(method: str, head_dim: int, device: torch.device) -> GateResult:
    """Each outer gradient of training with `method`, whatever is computed again, by relative L2 error."""
    config = small_config(method, head_dim)
    dtype = getattr(torch, precision_on(device))
    schedules = ["none", "2-blocks", *(["1-steps", "step", "all"] if method == "e2e" else [])]
    found = [gradient for schedule in schedules for gradient in gradients(config, device, dtype, schedule)]
    exact = gradients(config, "cpu", torch.float64) * len(schedules)
    plain = gradients(config, "cpu", dtype) * len(schedules) if dtype == torch.bfloat16 else None
    return judged(f"outer gradients, {method}, head dim {head_dim}, {precision_on(device)}", found, exact, plain)


def check_scores(method: str, head_dim: int, device: torch.device) -> GateResult:
    """The scores of reading with `method`, by relative L2 error."""
    config = small_config(method, head_dim)
    dtype = getattr(torch, precision_on(device))
    exact = scores(config, "cpu", torch.float64, dtype)
    plain = scores(config, "cpu", dtype, dtype) if dtype == torch.bfloat16 else None
    name = f"scores of reading, {method}, head dim {head_dim}, {precision_on(device)}"
    return judged(name, scores(config, device, dtype, dtype), exact, plain)


def judged(name: str, found: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor] | None) -> GateResult:
    """Errors of `found` against `exact`, beside those of `plain`, a reference in the same type, where that is narrow.

    A tensor may be off by twice what the reference's is off.
    """
    errors = [relative(a, e) for a, e in zip(found, exact, strict=True)]
    if plain is None:
        passed = all(error <= FLOAT32_BOUND for error in errors)
        return GateResult(name, passed, f"worst error {max(errors):.1e}, allowed {FLOAT32_BOUND:.0e}")
    of_plain = [relative(a, e) for a, e in zip(plain, exact, strict=True)]
    shares = [error / max(reference, 1e-30) for error, reference in zip(errors, of_plain, strict=True)]
    passed = all(share <= TIMES_REFERENCE for share in shares)
    detail = f"worst error {max(errors):.1e}, plain PyTorch's {max(of_plain):.1e}; {max(shares):.2f} times its own"
    return GateResult(name, passed, f"{detail}, allowed {TIMES_REFERENCE:g}")


def relative(actual: Tensor, expected: Tensor) -> float:
    """L2 distance as a share of the expected norm; infinite where it is not a number."""
    error = ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


@contextlib.contextmanager
def refusing_fallbacks() -> Iterator[None]:
    """A fast path that warns that it computes something else, and withdraws, makes the case red."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, GraphRefused):
            raise GateFailed(str(warning.message))
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _tokens(count: int, length: int) -> Tensor:
    return torch.randint(_VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
