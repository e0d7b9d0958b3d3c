"""Reading with tokens kept beyond the window on an NVIDIA GPU, by CUDA graphs, without them, and with nothing kept.

    PYTHONPATH=src python3 -m benchmarks.gpu_kept_tokens

A reader of the shape of SmolLM2-135M with drawn weights reads drawn tokens, in turns; the window is full and as many
tokens are kept as may be before anything is timed. Gate: losses by graphs are those without to 0.1 nats.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from unittest.mock import patch

import torch

from longread.bench.cases import Case
from longread.config import InnerConfig, ModelConfig
from longread.inner_loop import begin, read, reading
from longread.model import Transformer, initialize

KEPT, MINI_BATCHES, ROUNDS = 1024, 16, 3
TOLERANCE = 0.1


def main() -> None:
    """Prints a row for each case."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    config = Case("first-read", "e2e", "135m", 32_768).network
    for sequences in (1, 8, 60):
        for learn in (True, False):
            measure(config, sequences, learn)


@contextlib.contextmanager
def graphs(wanted: bool) -> Iterator[None]:
    """Whether texts are read as CUDA graphs where they can be."""
    with contextlib.nullcontext() if wanted else patch.object(reading, "can_capture", lambda device: False):
        yield


def measure(config: ModelConfig, sequences: int, learn: bool) -> None:
    """Medians and ranges of milliseconds a mini-batch, and tokens a second."""
    inner, losses = InnerConfig(), {}
    for kept, by_graphs in ((0, True), (KEPT, True), (KEPT, False)):
        model = Transformer(dataclasses.replace(config, kept_tokens=kept))
        initialize(model, seed=0)
        model = model.to("cuda", torch.bfloat16)
        M, full = model.config.mini_batch_size, model.config.window_size + KEPT + model.config.mini_batch_size
        draw, shape = torch.Generator().manual_seed(0), (sequences, full + MINI_BATCHES * M + 1)
        tokens = torch.randint(0, model.config.vocab_size, shape, generator=draw).to(model.device)
        with graphs(by_graphs):
            state = read(model, begin(model, sequences), tokens[:, :full], inner=inner, learn=learn).state
            taken = []
            for _ in range(ROUNDS + 1):  # the first captures
                torch.cuda.synchronize()
                begun = time.perf_counter()
                found = read(model, state, tokens[:, full:], inner=inner, learn=learn)
                torch.cuda.synchronize()
                taken.append((time.perf_counter() - begun) * 1e3 / MINI_BATCHES)
        losses[kept, by_graphs] = found.nll
        each = [f"{ms:.1f}" for ms in (statistics.median(taken[1:]), min(taken[1:]), max(taken[1:]))]
        rate = sequences * M / statistics.median(taken[1:]) * 1e3
        how = "graphs" if by_graphs else "no graphs"
        what = f"{sequences} texts, {'learning' if learn else 'frozen'}, {kept} kept, {how}"
        print(f"{what:42} {each[0]} ({each[1]}-{each[2]}) ms a mini-batch, {rate:,.0f} tokens/s", flush=True)
    off = (losses[KEPT, True] - losses[KEPT, False]).abs().max().item()
    if not off < TOLERANCE:
        raise SystemExit(f"losses by graphs are {off:.2g} nats off those without")


if __name__ == "__main__":
    main()
