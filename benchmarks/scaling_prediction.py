"""Training on 8, 64 and 1024 GPUs, predicted: the tables of docs/scaling.md.

    python -m benchmarks.scaling_prediction [--gpu h200]

Nothing is measured here. One GPU's share of its peak comes from measurements of one (longread.planning.measured), the
rates of links from data sheets, and what both reach together is assumed (longread.planning.timing).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator

from longread.config import Parallelism, RunConfig, UserError
from longread.planning import GPUS, Gpu, Layout, Plan, gpu_named, plan_training
from longread.recipes import PRETRAINING_CONTEXT, recipe

SIZES = ("125m", "760m", "3b")
CONTEXTS = (8192, 32_768, 131_072)
COUNTS = (8, 64, 1024)
NODE = 8
NETWORKS = (400, 100, 25)
"""Gbit/s of each GPU's adapter."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200", help=", ".join(GPUS))
    try:
        gpu = gpu_named(parser.parse_args().gpu)
    except UserError as error:
        print(f"scaling_prediction: error: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(tables(gpu)))
    return 0


def tables(gpu: Gpu) -> tuple[str, ...]:
    """All of the page."""
    return papers_batch(gpu), one_sequence(gpu), networks(gpu)


def run_of(size: str, context: int) -> RunConfig:
    """Pre-training, or extension to a longer context."""
    if context == PRETRAINING_CONTEXT:
        return recipe(size)
    return recipe(f"{size}-extend", context_length=context)


def papers_batch(gpu: Gpu) -> str:
    """With the batch of the paper: GPUs beyond its sequences divide the fast MLPs, up to a node."""
    rows, least = [], {}
    for size, context, count in _cases():
        config = run_of(size, context)
        plan = of_whole_batch(config, count, gpu)
        name = [size, f"{context // 1024}K", str(count), str(config.batch_size)]
        if plan is None:
            rows.append([*name, *["–"] * 6, f"{config.batch_size * NODE} GPUs at most"])
            continue
        per_gpu = plan.tokens_per_second / count
        least.setdefault((size, context), per_gpu)
        rows.append(
            [
                *name,
                str(plan.layout.parallelism.state),
                *_figures(plan),
                f"{100 * per_gpu / least[size, context]:.0f}",
                _duration(plan.days),
            ]
        )
    head = ["size", "context", "GPUs", "sequences", "state parallel", "GiB a GPU", "again", "step, s", "K tokens/s"]
    return _table([*head, "a GPU, % of 8 GPUs", "the run"], rows)


def of_whole_batch(config: RunConfig, count: int, gpu: Gpu) -> Plan | None:
    """With as little state parallelism as lets the batch divide among `count` GPUs; None if nothing does."""
    for state in (1, 2, 4, 8):
        layout = Layout(NODE, count // NODE, Parallelism(state=state))
        if config.batch_size % layout.data_ranks == 0:
            return plan_training(config, layout, gpu)
    return None


def one_sequence(gpu: Gpu) -> str:
    """With one sequence on each GPU: the batch grows with their number."""
    rows = []
    for size, context, count in _cases():
        config = run_of(size, context)
        plan = plan_training(dataclasses.replace(config, batch_size=count), Layout(NODE, count // NODE), gpu)
        seconds = plan.seconds
        rows.append(
            [
                *(size, f"{context // 1024}K", str(count), f"{count / config.batch_size:g}"),
                *_figures(plan),
                *(f"{1e3 * part:.0f}" for part in (seconds.compute + seconds.update, seconds.within, seconds.between)),
                f"{100 * seconds.efficiency:.0f}",
            ]
        )
    head = ["size", "context", "GPUs", "× the paper's batch", "GiB a GPU", "again", "step, s", "K tokens/s"]
    return _table([*head, "computing, ms", "in a node, ms", "between nodes, ms", "computing, %"], rows)


def networks(gpu: Gpu) -> str:
    """64 GPUs with slower adapters, one sequence each."""
    rows = []
    for size in SIZES:
        for context in CONTEXTS:
            config = dataclasses.replace(run_of(size, context), batch_size=64)
            shares = []
            for gbits in NETWORKS:
                slower = dataclasses.replace(gpu, network=gbits * 1e9 / 8)
                shares.append(f"{100 * plan_training(config, Layout(NODE, 8), slower).seconds.efficiency:.0f}")
            rows.append([size, f"{context // 1024}K", *shares])
    return _table(["size", "context", *(f"{gbits} Gbit/s, %" for gbits in NETWORKS)], rows)


def _cases() -> Iterator[tuple[str, int, int]]:
    return ((size, context, count) for size in SIZES for context in CONTEXTS for count in COUNTS)


def _figures(plan: Plan) -> list[str]:
    return [
        f"{plan.load.memory.total / 2**30:.0f}{'' if plan.load.spare else ' (tight)'}",
        plan.load.recompute,
        f"{plan.seconds.total:.3g}",
        f"{plan.tokens_per_second / 1e3:,.0f}",
    ]


def _duration(days: float) -> str:
    if days >= 2:
        return f"{days:.1f} days"
    return f"{24 * days:.1f} h" if 24 * days >= 1 else f"{24 * 60 * days:.0f} min"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
