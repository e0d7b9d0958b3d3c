"""One fault after the other: a run meets it, is started again, and is compared with the undisturbed run."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

from tests.drill.faults import Fault
from tests.drill.judging import TOLERANCE, Wrong, check_finished, check_survivors, difference
from tests.drill.launching import Forked, Start, Torchrun
from tests.drill.reading import Reading
from tests.test_train import make_data

STEPS, EVERY = 12, 3
FIELDS = {
    "model.width": 16,
    "model.num_blocks": 2,
    "model.num_heads": 2,
    "model.mlp_hidden": 16,
    "model.window_size": 8,
    "model.mini_batch_size": 8,
    "model.num_suffix_blocks": 1,
    "context_length": 32,
    "batch_size": 4,
    "steps": STEPS,
    "optimizer.warmup_steps": 2,
    "evaluate_every": 6,
    "checkpoint_every": EVERY,
    "precision": "float64",
}


class Drill:
    """Data, and the run that meets no fault."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = make_data(directory / "texts").directory
        self.whole: dict[tuple[str, ...], Path] = {}
        self._undisturbed(())
        self.counts = [json.loads((directory / "undisturbed" / f"counts-{rank}").read_text()) for rank in (0, 1)]

    def arguments(self, run: Path, *more: str) -> list[str]:
        fields = [word for name, value in FIELDS.items() for word in ("--set", f"{name}={value}")]
        own = ["--data", str(self.data), "--out", str(run), "--device", "cpu", "--quiet"]
        return ["train", "toy", *fields, *own, *more]

    def _undisturbed(self, options: tuple[str, ...]) -> Path:
        """A run that keeps all its checkpoints."""
        if options not in self.whole:
            run = self.directory / f"whole-{len(self.whole)}"
            start = Forked(
                self.arguments(run, *options, "--set", "keep_checkpoints=100"), self.directory / "undisturbed"
            )
            if any(start.wait()):
                raise Wrong(f"the undisturbed run fails: {start.said()}")
            self.whole[options] = run
        return self.whole[options]

    def meet(self, fault: Fault, draws: random.Random) -> dict[str, Any]:
        """What happened; raises `Wrong` if it is not what should have."""
        run, place, whole = self.directory / "run", self.directory / "start", self._undisturbed(fault.options)
        shutil.rmtree(run, ignore_errors=True)
        row: dict[str, Any] = {"where": fault.where}
        with Reading(run, whole, self.directory) if fault.is_read else contextlib.nullcontext() as reading:
            start = self._start(fault, run, place)
            statuses = start.wait()
            row |= {"statuses": statuses, "said": self._said(start, fault)}
            self._check(start, fault)
            check_survivors(run, whole, exact=fault.exact)
            if fault.damage:
                row["where"] += "; " + (damaged := self._damage(fault, run, draws))
                row["said"] += self._check_refusal(fault, run, place)
                check_survivors(run, whole, damaged)
            if fault.again == "--resume":
                statuses, row["said again"] = self._go_on(fault, run, place)
            if any(statuses):
                raise Wrong(f"it ends with {statuses}: {start.said()}")
        if reading:
            row["read"] = reading.found()
        check_finished(run, f"step-{STEPS:08d}")
        apart = difference(run, whole)
        if apart > (0 if fault.exact else TOLERANCE):
            raise Wrong(f"losses or weights differ by {apart:.3g}")
        return row | {"difference": apart}

    def _start(self, fault: Fault, run: Path, place: Path) -> Start:
        arguments = self.arguments(run, *fault.options, "--deadline", str(fault.deadline))
        if fault.by == "torchrun":
            restarts = len(fault.injections) if fault.again == "torchrun" else 0
            return Torchrun(arguments, place, fault.injections, restarts=restarts)
        return Forked(arguments, place, fault.injections)

    def _go_on(self, fault: Fault, run: Path, place: Path) -> tuple[list[int], list[str]]:
        arguments = self.arguments(run, *fault.options, "--resume")
        kind = Torchrun if fault.by == "torchrun" else Forked
        start = kind(arguments, place, ranks=fault.ranks)
        statuses = start.wait()
        if any(statuses) or not re.search(fault.warns, "".join(start.said().values())):
            raise Wrong(f"started again it ends with {statuses}: {start.said()}")
        return statuses, self._lines(start)

    def _said(self, start: Start, fault: Fault) -> list[str]:
        """The lines of errors and warnings; nobody shows a traceback."""
        lines = self._lines(start)
        errors = [line for line in lines if line.startswith("longread: error: ")]
        if fault.says and not any(re.search(fault.says, line) for line in errors):
            raise Wrong(f"nobody says {fault.says!r}: {start.said()}")
        return lines

    def _lines(self, start: Start) -> list[str]:
        for rank, text in start.said().items():
            if "Traceback" in text:
                raise Wrong(f"rank and start {rank} says {text}")
        lines = [line for text in start.said().values() for line in text.splitlines()]
        return [line.replace(f"{self.directory}/", "") for line in lines]

    def _check(self, start: Start, fault: Fault) -> None:
        if not start.happened:
            raise Wrong("the fault did not happen")
        if left := start.left_over():
            raise Wrong(f"the processes {left} are left over")

    def _damage(self, fault: Fault, run: Path, draws: random.Random) -> str:
        self._copy = self.directory / "copy"
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(run, self._copy)
        return fault.damage(run, draws) if fault.damage else ""

    def _check_refusal(self, fault: Fault, run: Path, place: Path) -> list[str]:
        """Nothing wrong is loaded, and what was damaged can be put back."""
        if not fault.refused:
            return []
        start = Forked(self.arguments(run, "--resume"), place)
        statuses = start.wait()
        if statuses != [2, 2] or not any(re.search(fault.refused, text) for text in start.said().values()):
            raise Wrong(f"nobody refuses it: {statuses}, {start.said()}")
        shutil.rmtree(run)
        shutil.copytree(self._copy, run)
        return self._lines(start)
