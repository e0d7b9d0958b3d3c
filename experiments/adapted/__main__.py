"""Runs the jobs of `experiments.adapted` side by side on one GPU, until a deadline; run again, it goes on.

    python -m experiments.adapted --packed packed --work work --out out --seconds 900
    python -m experiments.adapted --rehearse --packed packed --work work --out out --seconds 3600 --only first-order

A job is a process that runs its commands one after the other; as many run at once as `plan.ROOM` has memory for.
Nothing is started that would not finish. OUT/results.tar.xz holds the same as that of `experiments.run`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from experiments.adapted import answers, kept, low_rank, pack, plan, recall, rehearsal
from experiments.plan import Job
from experiments.run import Runner

PARTS = (plan, recall, answers, kept)
"""Modules whose `jobs(plan)` add jobs."""


class AdaptedRunner(Runner):
    """The same on one GPU, with these jobs and their data."""

    module: ClassVar[str] = "experiments.adapted"
    facts: ClassVar[tuple[str, ...]] = ("corpus.json",)

    def unpack(self) -> None:
        pack.unpack(self.packed, self.work / "data")
        if self.options.rehearse:
            rehearsal.tiny_llama(self.work / "data" / "tiny", self.work / "data" / "train")

    def finished(self, job: Job, status: str, code: int, gpu: int, seconds: float) -> None:
        super().finished(job, status, code, gpu, seconds)
        if status == "done":  # moments are twice as large as a model, and nothing goes on with them
            shutil.rmtree(self.work / "runs" / job.name / "checkpoints", ignore_errors=True)

    def all_jobs(self, scale: float) -> list[Job]:
        low_rank.register()
        data, rehearsed = self.work / "data", self.options.rehearse
        made = plan.Plan(
            data,
            self.work,
            plan.REHEARSAL_UNIT if rehearsed else plan.UNIT,
            scale,
            rehearsal.SETS if rehearsed else (),
            rehearsed=rehearsed,
        )
        parts = []
        for part in PARTS:
            before = len(made.jobs)
            part.jobs(made)
            parts.append(made.jobs[before:])
        return in_turn(parts)


def in_turn(parts: Sequence[Sequence[Job]]) -> list[Job]:
    """By tier; within a tier the first of each part, then the second of each, so that none waits for all of another."""
    found = []
    for part in parts:
        seen: Counter[int] = Counter()
        for job in part:
            found.append((job.tier, seen[job.tier], job))
            seen[job.tier] += 1
    return [job for _, _, job in sorted(found, key=lambda entry: entry[:2])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True, help="the pieces that `experiments.adapted.pack` left")
    parser.add_argument("--work", type=Path, required=True, help="where data, runs and the state lie between calls")
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--seconds", type=float, required=True, help="of this call, packing included")
    parser.add_argument("--gpus", type=int, choices=(0, 1), help="default: as there are; 0: run on the CPU")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="jobs, and what they need, in this order"
    )
    parser.add_argument("--rehearse", action="store_true", help="a tiny model and few steps, on a CPU")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    parser.add_argument("--commit", help="of this code, where no repository says it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(namespace=argparse.Namespace(**SETTLED))
    runner = AdaptedRunner(options)
    return runner.work_of(options.child) if options.child else runner.run()


SETTLED = {
    "per_gpu": plan.ROOM,
    "first_gpu": None,
    "first_gpu_after": 0.0,
    "scale": None,
    "last": True,
    "keep": [],
}
"""Options of `experiments.run` that are no question here."""

if __name__ == "__main__":
    sys.exit(main())
