"""Time and memory of one outer step of the toy on a CPU: Longread's schedules beside a naive loop, in one run.

    python -m benchmarks.outer_step_cpu [--rounds 5] [--out benchmarks/results]

First the gate: on the shape that is timed, loss and every gradient of Longread must be those of the naive loop.
Then each variant runs in a process of its own, in turns, so that a noisy machine disturbs all alike; and once
more per context length for its peak memory. Prints the tables and writes them to a dated file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from examples import ttt_e2e_minimal as minimal
from longread.model import Transformer, initialize
from longread.outer_loop import end_to_end_loss
from longread.recipes import toy
from longread.record import hardware
from longread.train.optimizer import gradient_norm, make_optimizer, update

SEQUENCES, CONTEXT = 8, 1024
LONGER = (1024, 2048, 4096, 8192)
VARIANTS = ("naive", "none", "blocks", "sqrt", "step", "all")
GRADIENT_TOLERANCE = 1e-4
# the official JAX code on 2 cores of the same kind: seconds a step, GiB, seconds of compilation before the first
OFFICIAL = (3.74, 2.0, 17)


def batch(sequences: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random bytes: the time does not depend on them."""
    tokens = torch.randint(256, (sequences, context + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:], torch.ones(sequences, context, dtype=torch.bool)


def loss_of(variant: str, model: Transformer, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss of the toy's outer step, with its graph."""
    if variant == "naive":
        parameters = dict(model.named_parameters())
        losses, _ = minimal.end_to_end_losses(parameters, model.config, *data, lr=1.0, clip=1.0)
        return minimal.mean_loss(losses, data[-1])
    return end_to_end_loss(model, *data, inner_lr=1.0, inner_clip=1.0, recompute=variant).loss  # type: ignore[arg-type]


def gate() -> float:
    """The worst relative error of a gradient against the naive loop's. Exits if it is out of tolerance."""
    model = Transformer(toy().model)
    initialize(model, seed=0)
    data = batch(SEQUENCES, CONTEXT)
    gradients = {}
    for variant in VARIANTS:
        loss = loss_of(variant, model, data)
        gradients[variant] = torch.autograd.grad(loss, list(model.parameters()))
    worst = max(
        ((actual - expected).norm() / expected.norm()).item()
        for variant in VARIANTS[1:]
        for actual, expected in zip(gradients[variant], gradients["naive"], strict=True)
    )
    if not worst <= GRADIENT_TOLERANCE:
        sys.exit(f"no speed on red: a gradient differs from the naive loop's by {worst:.1e}")
    return worst


def peak_kib() -> int:
    """Most memory this process has held. Not `getrusage`, whose maximum a process inherits from its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measure(variant: str, sequences: int, context: int, steps: int) -> dict[str, float]:
    """Seconds of each outer step after the first, and peak memory; to be run in a process of its own."""
    config = toy()
    model = Transformer(config.model)
    optimizer = make_optimizer(model, config.optimizer)
    data = batch(sequences, context)

    def step() -> float:
        start = time.perf_counter()
        loss_of(variant, model, data).backward()
        update(model, optimizer, config.optimizer, 100, gradient_norm(model.parameters()))
        return time.perf_counter() - start

    before = peak_kib()
    first = step()
    seconds = [step() for _ in range(steps)]
    peak = peak_kib()
    return {
        "first": first,
        "seconds": statistics.median(seconds) if seconds else first,
        "peak_gib": peak / 2**20,
        "added_mib": (peak - before) / 2**10,
    }


def in_its_own_process(variant: str, sequences: int, context: int, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.outer_step_cpu", "--worker", variant, sequences, context, steps]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] + ["--:"] * (len(head) - 1), *rows))


def speed(rounds: int, say: Callable[[str], None]) -> str:
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for i in range(rounds):
        for variant in VARIANTS:
            runs[variant].append(in_its_own_process(variant, SEQUENCES, CONTEXT, 3))
        say(f"round {i + 1} of {rounds}")
    peer = statistics.median(run["seconds"] for run in runs["naive"])
    rows = [["official (JAX, jit), quoted", f"{OFFICIAL[0]:.2f}", "", "", "", f"{OFFICIAL[1]:.1f}", f"{OFFICIAL[2]} s"]]
    for variant, found in runs.items():
        seconds = [run["seconds"] for run in found]
        middle = statistics.median(seconds)
        rows.append(
            [
                "naive loop" if variant == "naive" else f"Longread, recompute {variant}",
                f"{middle:.2f}",
                f"{min(seconds):.2f}–{max(seconds):.2f}",
                f"{peer / middle:.2f}",
                f"{OFFICIAL[0] / middle:.1f}",
                f"{max(run['peak_gib'] for run in found):.2f}",
                f"{statistics.median(run['first'] for run in found):.1f} s",
            ]
        )
    head = ["one outer step", "median s", "range", "× naive", "× official", "peak GiB", "first step"]
    return table(head, rows)


def memory(say: Callable[[str], None]) -> str:
    rows = []
    for variant in VARIANTS:
        found = []
        for context in LONGER:
            found.append(in_its_own_process(variant, 1, context, 0)["added_mib"])
            say(f"memory of {variant} at {context}")
        rows.append([variant, *(f"{mib:.0f}" for mib in found)])
    return table(["1 sequence", *(f"{c} tokens" for c in LONGER)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        variant, *numbers = options.worker
        print(json.dumps(measure(variant, *map(int, numbers))))
        return

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    worst = gate()
    say(f"gate passed: worst gradient error {worst:.1e}")
    machine = hardware()
    text = f"""# One outer step of the toy on a CPU, {date.today()}

`python -m benchmarks.outer_step_cpu --rounds {options.rounds}` on {json.dumps(machine)}; Python
{platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32.

Gate: every gradient agrees with the naive loop's on this shape, worst relative error {worst:.1e}.
{SEQUENCES} sequences of {CONTEXT} bytes, AdamW included; each entry is the median over {options.rounds} processes, in
turns, of the median of 3 steps. The official line is quoted from another day on a machine of this kind: compare with
it loosely, and with the naive loop strictly.

{speed(options.rounds, say)}

Memory by context length and by what is recomputed, above the idle process, in MiB:

{memory(say)}
"""
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"outer-step_cpu-{torch.get_num_threads()}-threads_{date.today()}.md"
    path.write_text(text, encoding="utf-8")
    say(f"written to {path}")


if __name__ == "__main__":
    main()
