"""Window, mini-batch, and how many blocks learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from experiments.figures import panel
from experiments.page import Data, Plot, Table, number
from experiments.plan import UNIT, ablations
from experiments.results import Results

from longread.evaluate import Line

SLUG = "ablations"
HEADING = """# Window, mini-batch, and how many blocks learn

Do the paper's three ablations come out?"""
NEEDS = tuple(f"ablate-{name}" for name in ablations(UNIT))
WINDOWS = {128: "window-1-8", 256: "window-1-4", 512: "window-1-2", 1024: "e2e"}
STATIC = {128: "swa-window-1-8", 256: "swa-window-1-4", 512: "swa-window-1-2", 1024: "swa"}
BATCHES = {64: "mini-batch-1-16", 128: "e2e", 256: "mini-batch-1-4", 512: "mini-batch-1-2", 1024: "mini-batch-1-1"}
BLOCKS = {1: "suffix-1", 2: "e2e", 4: "suffix-4"}
READ, FROZEN = "learning or static", "frozen"


def gather(found: Results) -> dict[str, Any]:
    def losses(name: str, length: int = 1) -> dict[str, float | None]:
        job, what = f"ablate-{name}" + ("-8" if length == 8 else ""), f"books-{length}"
        return {READ: found.loss(job, what), FROZEN: found.loss(job, what, "frozen")}

    results = {}
    for title, names in (("window", WINDOWS), ("SWA, window", STATIC), ("mini-batch", BATCHES), ("blocks", BLOCKS)):
        results |= {f"{title} {size}": losses(name) for size, name in names.items()}
    results |= {f"blocks {size}, 8K": losses(name, 8) for size, name in BLOCKS.items()}
    return results | {"full attention": losses("full")}


def tables(results: Data) -> Iterator[Table]:
    def row(name: str, prefix: str, sizes: Iterable[int], key: str = READ, suffix: str = "") -> list[str]:
        return [name, *(number(results[f"{prefix} {size}{suffix}"][key]) for size in sizes)]

    yield Table("Window:", ["", *map(str, WINDOWS)], [
        row("TTT-E2E", "window", WINDOWS),
        row("TTT-E2E, frozen", "window", WINDOWS, FROZEN),
        row("SWA", "SWA, window", STATIC),
    ])  # fmt: skip
    yield Table("Mini-batch:", ["", *map(str, BATCHES)], [
        row("learning", "mini-batch", BATCHES),
        row("frozen", "mini-batch", BATCHES, FROZEN),
    ])  # fmt: skip
    yield Table("Blocks that learn, of 8:", ["", *map(str, BLOCKS)], [
        row("1K, learning", "blocks", BLOCKS),
        row("1K, frozen", "blocks", BLOCKS, FROZEN),
        row("8K, learning", "blocks", BLOCKS, READ, ", 8K"),
        row("8K, frozen", "blocks", BLOCKS, FROZEN, ", 8K"),
    ])  # fmt: skip


def plots(found: Results) -> Iterator[Plot]:
    results = gather(found)

    def line(name: str, prefix: str, sizes: Iterable[int], key: str = READ, suffix: str = "") -> Line:
        losses = [(size, results[f"{prefix} {size}{suffix}"][key]) for size in sizes]
        return Line(name, [(size, loss) for size, loss in losses if loss is not None])

    panels = [
        panel("Window", [line("TTT-E2E", "window", WINDOWS), line("TTT-E2E, frozen", "window", WINDOWS, FROZEN),
              line("SWA", "SWA, window", STATIC)], "nats per token, books", ticks=list(WINDOWS)),
        panel("Mini-batch", [line("TTT-E2E", "mini-batch", BATCHES),
              line("TTT-E2E, frozen", "mini-batch", BATCHES, FROZEN)], ticks=list(BATCHES)),
        panel("Blocks that learn", [line("TTT-E2E, 1K", "blocks", BLOCKS),
              line("TTT-E2E, 8K", "blocks", BLOCKS, READ, ", 8K")], x="of 8", ticks=list(BLOCKS)),
    ]  # fmt: skip
    yield Plot("ablations", "Three ablations", panels)
