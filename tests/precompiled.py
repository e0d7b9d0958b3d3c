"""A later process for `tests/test_precompile.py`: launches on real memory, by a driver that launches nothing.

Functions that a rehearsal is named by must not be those of `__main__`, so it is begun by `launches`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.runtime.driver import driver

from longread.config import InnerConfig, ModelConfig, RunConfig
from longread.data import Batch
from longread.inner_loop import finishing, graphs, reading as inner_loop_reading, rehearsal
from longread.inner_loop.places import LikeliestTokens
from longread.model import Transformer
from longread.ops import compiling, fusible, precompile
from longread.ops.swiglu import swiglu
from longread.recipes import recipe
from longread.session import Session
from longread.train import rehearsal as training
from longread.train.gradient import accumulate_gradient
from tests.fake_graphs import _Stream

HOPPER = 90
CONFIG = ModelConfig(
    vocab_size=256,
    width=64,
    num_blocks=4,
    num_heads=4,
    kv_heads=2,
    mlp_hidden=96,
    window_size=64,
    mini_batch_size=32,
    num_suffix_blocks=2,
)


def gates(width: int, device: str = "meta") -> None:
    """The gate, its gradient and the gradient of that."""
    a, b, up = (torch.zeros(2, 64, width, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))
    first = torch.autograd.grad(swiglu(a, b), [a, b], up, create_graph=True)
    torch.autograd.grad(first, [a, b], [up, up])


def reading() -> None:
    """As on a GPU, but that its graphs are runs."""
    for name, stand_in in {"Stream": _Stream, "current_stream": _Stream, "stream": contextlib.nullcontext}.items():
        setattr(torch.cuda, name, stand_in)
    finishing.can_capture = inner_loop_reading.can_capture = graphs.can_capture = lambda device: True
    graphs.CheckedGraphs.run = lambda self, key, compute, **_: compute()  # type: ignore[method-assign]
    wait = LikeliestTokens.wait
    LikeliestTokens.wait = lambda *given: [(0, p) for _, p in wait(*given)]  # type: ignore[method-assign]  # no kernel ran
    session = Session(Transformer(CONFIG).bfloat16().requires_grad_(False), InnerConfig())
    for _ in range(2):
        session.read(torch.randint(CONFIG.vocab_size, (5 * CONFIG.mini_batch_size + 1,)))
    list(session.generate(3, temperature=0.0))


def step_config() -> RunConfig:
    made = recipe("toy", "e2e", context_length=256)
    return dataclasses.replace(made, batch_size=2, micro_batch_size=1, precision="bfloat16", recompute="none")


def step() -> None:
    config, model = step_config(), Transformer(step_config().model)
    model.compute_dtype = torch.bfloat16
    ids = torch.randint(config.model.vocab_size, (2, 256))
    batch = Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    accumulate_gradient(model, config, batch, inner_lr=torch.zeros(()))


WORKS: dict[str, tuple[Any, ...]] = {
    "gates": (lambda: gates(96, "cpu"), gates, 96),
    "reading": (
        reading,
        rehearsal.rehearse_reading,
        CONFIG.as_dict(),
        InnerConfig().as_dict(),
        ["bfloat16", "bfloat16"],
        True,
    ),
    "step": (step, training.rehearse_step, step_config().as_dict()),
}


class IdleDriver(compiling.NoDevice):
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        load_binary=lambda *_: (None, None, 32, 0, 1024),
    )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Any:
        return lambda *_: None


def launches(work: str, ahead: bool) -> None:
    """Prints which kernels were found in Triton's cache and which were compiled; `ahead`: after `precompile`."""
    launched, *rehearsed = WORKS[work]
    found: dict[str, list[str]] = {"cached": [], "compiled": []}

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found["cached" if cache_hit else "compiled"].append(src.name)

    if ahead:
        precompile.FEWEST_PROCESSORS, precompile.LONGEST = 1, 3600  # a loaded machine is no fault
        precompile.begin(*rehearsed[:1], rehearsed[1:], HOPPER)
    driver.set_active(IdleDriver(HOPPER))
    knobs.compilation.listener = listen
    fusible.is_on_a_gpu = lambda x: True
    with torch.autograd.set_multithreading_enabled(False):
        launched()
    print(json.dumps(found))


def imports() -> None:
    """Prints how many kernels reading and a step launch, of which none is compiled, and which modules came."""
    counts = list[int]()
    fusible.is_on_a_gpu = lambda x: True
    for work in ("reading", "step"):
        noted = list[Any]()
        compiling.note_launches(WORKS[work][0], [], HOPPER, noted.append)
        counts.append(len(noted))
    print(json.dumps({"counts": counts, "modules": list(sys.modules)}))
