"""Recall: needles found by generation, and three attempts at finding more of them beyond the window.

Each adapted model answers S-NIAH-1 to 3, learning and frozen, all variants of one context side by side; the verbatim
probe says whether the value was stored at all. The attempts differ from their base in one thing: facts to recall in
the training sequences, an inner loss weighted by surprise, full attention in every sixth block (not constant memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.adapted.plan import BESIDE, DIAL_STEPS, STEPS, UNIT, Plan
from experiments.plan import Command

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PER_DEPTH = 4
VARIANTS = (1, 2, 3)
SIDE_BY_SIDE = PER_DEPTH * len(DEPTHS) * len(VARIANTS)
"""All prompts of one context."""
ANSWER_TOKENS = 64
"""A UUID takes 36 at most."""
GRID, PRETRAINED, FEW, OF_HYBRIDS = (0.5, 2, 4, 8, 16, 32), (0.5, 2, 4, 8), (0.5, 4, 16), (0.5, 4, 8, 16)
"""Contexts in units, the first of them inside the window: all, as far as full attention was pretrained, some."""
SHORTEST = 256
"""Tokens of a context of a rehearsal: a UUID, asked for, has to fit."""
START, GIBIBYTES = 10.0, 36
"""Seconds before the first prompt of a command, and memory of one that only asks."""
ASKED_PER_SECOND = {"learning": 130e3, "static": 400e3}
"""Tokens of prompts, with answers; learning: each prompt is read frozen too. A guess."""
EXPERIMENT = "recall"


def jobs(plan: Plan) -> None:
    """Needles of the models that others train, then the attempts."""
    asked(plan, "first-order", plan.run_of("first-order"), GRID, verbatim=(4, 16))
    asked(plan, "swa", plan.run_of("swa"), FEW, verbatim=(4,), reading="static")
    asked(plan, "full", plan.run_of("full"), PRETRAINED, reading="static")
    asked(plan, "original", plan.reader("original"), PRETRAINED, reading="static")
    attempt(plan, "recall-30", 1, sets=("recall=0.3",))
    attempt(plan, "surprise-1", 1, sets=("inner.surprise=1",))
    attempt(plan, "hybrid", 1, sets=("model.attention=hybrid",), steps=DIAL_STEPS)
    deeper = ("recall=0.3", "micro_batch_size=4", 'recompute="none"')
    attempt(plan, "recall-30-suffix-15", 2, reader="reader-suffix-15", sets=deeper, slowness=1.5, gibibytes=56)
    attempt(plan, "recall-30-surprise-1", 2, sets=("recall=0.3", "inner.surprise=1"))
    attempt(plan, "swa-recall-30", 3, kind="swa", sets=("recall=0.3",))
    attempt(plan, "hybrid-recall-30", 3, sets=("recall=0.3", "model.attention=hybrid"))
    attempt(plan, "surprise-0.5", 3, sets=("inner.surprise=0.5",))
    attempt(plan, "hybrid-frozen", 3, kind="full", options=("--method", "hybrid"), steps=DIAL_STEPS)
    attempt(plan, "recall-10", 4, sets=("recall=0.1",))
    attempt(plan, "recall-30-s1", 4, sets=("recall=0.3",), seed=1)


def attempt(
    plan: Plan,
    name: str,
    tier: int,
    *,
    kind: str = "first-order",
    sets: Sequence[str] = (),
    options: Sequence[str] = (),
    steps: int = STEPS,
    seed: int = 0,
    reader: str = "reader",
    slowness: float = 1.0,
    gibibytes: int | None = None,
) -> None:
    """A model trained like the base of its steps but for its settings, evaluated on books and on needles."""
    reading = "learning" if kind == "first-order" else "static"
    grid = OF_HYBRIDS if "hybrid" in name else FEW
    commands, seconds = questions(plan, name, plan.run_of(name), grid, (4,), reading)
    plan.model(
        name,
        tier,
        kind,
        reader=reader,
        seed=seed,
        steps=steps,
        options=options,
        sets=sets,
        further=commands,
        seconds=seconds,
        slowness=1.2 if "hybrid" in name else slowness,
        gibibytes=gibibytes,
        experiment=EXPERIMENT,
    )


def asked(
    plan: Plan,
    name: str,
    model: Path,
    grid: Sequence[float],
    *,
    verbatim: Sequence[float] = (),
    reading: str = "learning",
) -> None:
    """A job that asks a model which another job makes."""
    commands, seconds = questions(plan, f"needle-{name}", model, grid, verbatim, reading)
    plan.job(f"needle-{name}", 1, commands, (name,), seconds=seconds, gibibytes=GIBIBYTES, experiment=EXPERIMENT)


def questions(
    plan: Plan, name: str, model: Path, grid: Sequence[float], verbatim: Sequence[float], reading: str
) -> tuple[list[Command], float]:
    """Commands for the question as asked and for the verbatim probe, each in its contexts; and their seconds."""
    commands, seconds = [], 0.0
    for probe, units in (("question", grid), ("verbatim", verbatim)):
        if not units:
            continue
        result = plan.result_of(name, probe)
        contexts = sorted({max(SHORTEST, int(min(u, plan.shown(32)) * plan.unit)) for u in units})
        arguments = ["needle", str(model), "--probe", probe, "--variants", *map(str, VARIANTS)]
        arguments += ["--contexts", *map(str, contexts), "--depths", *map(str, DEPTHS), "--samples", str(PER_DEPTH)]
        arguments += ["--haystack", str(plan.data / "books"), "--batch-size", str(SIDE_BY_SIDE)]
        arguments += ["--max-tokens", str(ANSWER_TOKENS), "--json", str(result)]
        commands.append(Command(tuple(arguments), result))
        tokens = sum(units) * UNIT * SIDE_BY_SIDE
        seconds += START + BESIDE * tokens / ASKED_PER_SECOND[reading]
    return commands, seconds
