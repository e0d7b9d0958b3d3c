"""One outer step through all pointwise kernels, on poisoned memory; without a GPU in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longread.config import ModelConfig, Recompute
from longread.model import Transformer, initialize
from longread.outer_loop import end_to_end_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("interpreter", "poisoned_memory")


def network(num_blocks: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=23,
        width=16,
        num_blocks=num_blocks,
        num_heads=2,
        mlp_hidden=24,
        window_size=5,
        mini_batch_size=4,
        num_suffix_blocks=2,
    )


def all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("rms_norm", "swiglu", "rotary", "cross_entropy", "clipped_sgd"):
        monkeypatch.setattr(importlib.import_module(f"longread.ops.{op}"), "fusible", lambda *tensors: True)


@pytest.mark.parametrize("recompute", ["none", pytest.param("blocks", marks=pytest.mark.slow), "step"])
def test_the_outer_gradient_through_all_kernels(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    config = network(num_blocks=4)
    tokens = torch.randint(23, (2, 9), device=DEVICE)
    mask = torch.rand(2, 8, device=DEVICE) > 0.2

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        model = Transformer(config)
        initialize(model, seed=0)
        model = model.to(DEVICE, dtype)
        batch = tokens[:, :-1], tokens[:, 1:], mask
        lr = torch.tensor(0.7, device=DEVICE, dtype=dtype)
        out = end_to_end_loss(model, *batch, inner_lr=lr, inner_clip=0.3, recompute=recompute)
        out.loss.backward()
        return [out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = gradients(torch.float64)
    all_kernels(monkeypatch)
    for found, exact in zip(gradients(torch.float32), expected, strict=True):
        assert (found.double() - exact).norm() <= 1e-5 * exact.norm()


def test_an_outer_step_sums_no_gradients_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels add what comes from an op and its derivative, and from a sub-layer and the stream around it."""
    config, B, H = network(num_blocks=3), 2, 8
    M, D, F = config.mini_batch_size, config.width, config.mlp_hidden
    model = Transformer(config)
    initialize(model, seed=0)
    model = model.to(DEVICE)
    model.compute_dtype = torch.bfloat16
    all_kernels(monkeypatch)
    sums: Counter[tuple[int, ...]] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and out.dtype == torch.bfloat16:
                sums[tuple(out.shape)] += 1
            return out

    tokens = torch.randint(23, (B, 3 * M + 1), device=DEVICE)
    batch = tokens[:, :-1], tokens[:, 1:], torch.ones(B, 3 * M, dtype=torch.bool, device=DEVICE)
    with torch.autograd.set_multithreading_enabled(False), Watch():
        end_to_end_loss(model, *batch, inner_lr=0.7, inner_clip=0.3, recompute="none").loss.backward()
    assert sums[B, 2, M, H] > 0, "keys and values serve several mini-batches"
    assert not [shape for shape in sums if shape in ((B, M, D), (B, M, F), (B, F, D), (B, D, F))]
