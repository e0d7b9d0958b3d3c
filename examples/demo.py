"""The main job in ten minutes on a laptop: train three small models on this machine's own text and let them read.

    make demo-train  or: python examples/demo.py [--out runs/demo] [--seed 0] [--steps 250]

The text is the running Python's standard library, source and documentation: real text that every machine has. TTT-E2E,
sliding-window attention and full attention get equal parameters and equal tokens. Then each reads files that none was
trained on, and TTT-E2E reads them a second time frozen: the same weights without learning. Prints a table and writes
OUT/summary.json and OUT/report.html.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from longread.cli.outputs import write_text
from longread.config import UserError
from longread.data import TokenDataset, prepare
from longread.evaluate import (
    Chart,
    Document,
    Evaluation,
    Figures,
    Line,
    Measurement,
    bin_edges,
    html_report,
    measure,
    print_tables,
    summarize,
)
from longread.evaluate.summary import Result
from longread.files import remove_tree
from longread.recipes import Method, toy
from longread.record import hardware
from longread.tokenizer import ByteTokenizer
from longread.train import TrainingProgress, TrainResult, train

METHODS: dict[Method, str] = {"e2e": "TTT-E2E", "swa": "SWA", "full": "full attention"}
LEFT_OUT = ["site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"]
CONTEXT = 1024
FURTHER = 16384
HELD_OUT = 0.1
TEXTS = 48
"""Held-out passages of CONTEXT tokens that all methods read, from as many files."""
LONG_TEXTS = 6
"""Held-out files of FURTHER tokens that TTT-E2E reads to the end."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    try:
        return demo(options.out, options.seed, options.steps)
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2


def demo(out: Path, seed: int, steps: int) -> int:
    begun = time.monotonic()
    console = Console(width=120)
    clear(out)
    library = Path(sysconfig.get_paths()["stdlib"])
    data = prepare([library], out / "data", ByteTokenizer(), exclude=LEFT_OUT, validation_fraction=HELD_OUT)
    if data.validation is None:
        raise UserError(f"{library} holds too few source files to keep some apart; use a full Python installation")
    console.print(
        f"{data.num_documents} files of {library}, {data.num_tokens:,} bytes; {data.validation.num_documents} held out"
    )

    passages, long_texts = held_out(data.validation)
    trained: dict[Method, TrainResult] = {}
    measured: list[Measurement] = []
    for method, name in METHODS.items():
        config = toy(method, seed=seed, steps=steps)
        console.print(f"\n[bold]{name}[/bold]: {config.model.num_parameters:,} parameters, {steps} steps")
        with TrainingProgress(config) as progress:
            trained[method] = train(config, data, out / method, device="cpu", on_step=progress)
        model = trained[method].model.requires_grad_(False)
        measured += [
            measure(name, model, config.inner, passages, bin_edges([CONTEXT]), learn=learn, bos_id=data.bos_id)
            for learn in ((True, False) if method == "e2e" else (False,))
        ]
    evaluation = summarize(measured, lengths=[CONTEXT])

    e2e = trained["e2e"].model
    further = [
        measure(METHODS["e2e"], e2e, config.inner, long_texts, bin_edges(), learn=learn, bos_id=data.bos_id)
        for learn in (True, False)
    ]
    lengths = [1024, 2048, 4096, 8192, FURTHER]
    reading_on = summarize(further, lengths=lengths)

    console.print("\n[bold]Held-out files[/bold]")
    print_tables(evaluation, console)
    console.print(f"\n[bold]TTT-E2E reading on, far beyond the {CONTEXT} bytes it was trained at[/bold]")
    print_tables(reading_on, console)
    seconds = time.monotonic() - begun
    write_text(
        out / "summary.json", json.dumps(summary(evaluation, reading_on, trained, seed, seconds), indent=2) + "\n"
    )
    lead = f"Three models of equal size after {steps * 8 * CONTEXT:,} bytes of the Python standard library each, "
    lead += f"reading {len(passages)} held-out files. Seed {seed}."
    page = html_report(evaluation, title="Longread demo", lead=lead, more=Figures([], [training_chart(out)]))
    write_text(out / "report.html", page)
    console.print(f"\n{out}/report.html and {out}/summary.json, {seconds:.0f} s")
    return 0


def clear(out: Path) -> None:
    """Removes what an earlier demo left in `out`. Raises `UserError` if anything else lies there."""
    if not out.exists():
        return
    ours = {"summary.json", "report.html", *METHODS} | ({"data"} if (out / "data" / "index.json").exists() else set())
    if not out.is_dir() or any(path.name not in ours and not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} holds other files than those of an earlier demo; give --out a new directory")
    for name in ours:
        remove_tree(out / name)


def held_out(dataset: TokenDataset) -> tuple[list[Document], list[Document]]:
    """The beginnings of the longest held-out files: passages for all methods, and fewer, longer texts."""
    longest = sorted(range(dataset.num_documents), key=lambda i: -len(dataset.document(i)))

    def beginnings(count: int, length: int) -> Iterator[Document]:
        for i in longest[:count]:
            tokens = dataset.document(i)[: length + 1]
            if len(tokens) == length + 1:
                yield Document(dataset.document_name(i), tokens, (tokens != dataset.bos_id).astype(np.int64))

    passages, long_texts = list(beginnings(TEXTS, CONTEXT)), list(beginnings(LONG_TEXTS, FURTHER))
    if len(passages) < 2 or not long_texts:
        raise UserError(f"too few held-out files of {FURTHER} bytes; use a full Python installation")
    return passages, long_texts


def training_chart(out: Path) -> Chart:
    """The loss of every step of every run."""
    lines = []
    for color, (method, name) in enumerate(METHODS.items()):
        rows = map(json.loads, (out / method / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        lines.append(Line(name, [(float(row["step"]), row["loss"]) for row in rows], color=color))
    return Chart("training", "Loss in training", "step", "nats per token", lines, log_x=False)


def summary(
    evaluation: Evaluation, reading_on: Evaluation, trained: dict[Method, TrainResult], seed: int, seconds: float
) -> dict[str, Any]:
    """For each method: loss, bits per byte, loss by position, parameters, tokens, seconds; and the frozen control."""
    methods: dict[str, Any] = {}
    for result in evaluation.results:
        method = next(m for m, name in METHODS.items() if name == result.model)
        figures = {
            "loss": result.loss.nats_per_token.mean,
            "bits_per_byte": result.loss.bits_per_byte.mean if result.loss.bits_per_byte else None,
            "loss_by_position": by_position(result),
        }
        if result.reading == "frozen":
            methods[method]["frozen"] = figures
        else:
            methods[method] = figures | {
                "parameters": result.parameters,
                "tokens": trained[method].tokens,
                "seconds": trained[method].seconds,
            }
    return {
        "seed": seed,
        "held_out_documents": evaluation.documents,
        "methods": methods,
        "e2e_reading_on": {result.reading: by_position(result) for result in reading_on.results},
        "seconds": seconds,
        "hardware": hardware(),
    }


def by_position(result: Result) -> list[dict[str, float]]:
    return [{"from": row.start, "to": row.end, "loss": row.score.nats_per_token.mean} for row in result.by_position]


if __name__ == "__main__":
    sys.exit(main())
