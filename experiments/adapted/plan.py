"""The jobs of adaptation: SmolLM2-135M made a reader and trained on books, its twins, and one dial changed at a time.

What other modules find, once the job of that name is done (`needs`):

    plan.reader("reader")         converted: window 1024, mini-batch 256, the last 8 of 30 blocks; job "reader"
    plan.run_of("first-order")    adapted, first-order: the base of everything that follows
    plan.run_of("exact")          adapted, exact meta-gradient
    plan.run_of("swa"), ("full")  twins without fast weights, windowed and with full attention, on the same batches
    plan.data / "train"           tokens of the training books; their texts are not there
    plan.data / "validation"      tokens of the seven validation books, `plan.data / "books"` their texts
    plan.data / NAME              any other data set that lay in PACKED/NAME, as `experiments.corpus.compress` writes it
    plan.source                   the pretrained model itself

Tiers: 0 models that others need, 1 what each question is first answered by, 2 the rest of it, 3 and 4 what may be left
out. Within a tier the parts of `__main__.PARTS` take turns.
Lengths are multiples of `plan.unit`, the window: 1024, but in a rehearsal 64. Jobs run side by side on the one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import plan as small
from experiments.plan import Command

UNIT, REHEARSAL_UNIT = 1024, 64
MINI_BATCHES = 4
"""Of a window."""
CONTEXT = 8
"""Units of a training sequence."""
BATCH = 8
STEPS, DIAL_STEPS = 100, 50
"""6.55M tokens; of the runs that differ in one dial, and of their base, half of that."""
SUFFIX = 8
ROOM = 126
"""GiB of a GPU's 139 that jobs may take; the rest is for contexts and what allocators round up."""
START = 25.0
"""Seconds of a training job before its first step and after its last."""
BESIDE = 1.7
"""How much longer work on the GPU takes beside another job."""
TOKENS_PER_SECOND = {"first-order": 170e3, "exact": 122e3, "swa": 333e3, "full": 212e3}
"""Of training with the GPU for itself, 8 × 8192 tokens a step (experiments/2026-11-29_pretrained)."""
TRAINING = {"first-order": 58, "exact": 66, "swa": 40, "full": 40}
"""GiB: measured there where nothing is computed again, less what `recompute` saves by `longread estimate`."""
RECOMPUTE = {"first-order": "14-blocks", "exact": "blocks"}
READING = 14
"""GiB of a job that only reads."""
READ_PER_SECOND = {"learning": 40e3, "frozen": 300e3}
"""Tokens, seven books side by side."""
BOOKS = 7


@dataclass(frozen=True)
class Job(small.Job):
    """One with its own estimates."""

    seconds: float = 0.0
    """Beside another job."""
    gibibytes: int = READING

    @property
    def weight(self) -> int:
        return self.gibibytes

    @property
    def estimated_seconds(self) -> float:
        return self.seconds


@dataclass
class Plan(small.Plan):
    """Makes the jobs; `sets` and `scale` are those of a rehearsal."""

    rehearsed: bool = False

    @property
    def source(self) -> Path:
        """The pretrained model, a GGUF file."""
        return self.data / ("tiny" if self.rehearsed else "source.gguf")

    def reader(self, name: str = "reader") -> Path:
        """A converted model that was not trained yet."""
        return self.work / "readers" / name

    def hidden(self, units: int) -> str:
        """So many of the 1536 hidden units, or the same share of a rehearsal's 96."""
        return str(units // 16 if self.rehearsed else units)

    def shown(self, units: int) -> int:
        """Units that are read where `units` are meant: fewer in a rehearsal."""
        return min(units, 16) if self.rehearsed else units

    def job(
        self,
        name: str,
        tier: int,
        commands: Sequence[Command],
        needs: Sequence[str] = (),
        *,
        seconds: float,
        gibibytes: int = READING,
        tokens: int = 0,
        experiment: str = "adapted",
    ) -> None:
        """`seconds` beside another job; `gibibytes` of the GPU, 0 for one that needs none."""
        self.jobs.append(
            Job(
                name,
                tier,
                tuple(commands),
                tuple(needs),
                tokens=tokens,
                experiment=experiment,
                seconds=seconds,
                gibibytes=gibibytes,
            )
        )

    def convert(self, name: str, tier: int, *options: str) -> str:
        """A job that converts the source, on a processor alone."""
        arguments = ["convert", str(self.source), str(self.reader(name)), "--window", str(self.unit)]
        arguments += ["--mini-batch", str(self.unit // MINI_BATCHES)]
        if "--suffix" not in options:
            arguments += ["--suffix", str(SUFFIX)]
        command = Command((*arguments, *options), self.reader(name) / "config.json")
        self.job(name, tier, [command], seconds=25, gibibytes=0)
        return name

    def training(
        self,
        name: str,
        kind: str = "first-order",
        *,
        reader: str = "reader",
        data: Path | None = None,
        steps: int = STEPS,
        seed: int = 0,
        options: Sequence[str] = (),
        sets: Sequence[str] = (),
    ) -> Command:
        """`kind`: first-order, exact, swa or full; `options` and `sets` are those of `longread train`."""
        method = kind if kind in ("swa", "full") else "e2e"
        arguments = ["train", str(self.reader(reader)), "--method", method, "--data", str(data or self.data / "train")]
        arguments += [
            "--out",
            str(self.run_of(name)),
            "--seed",
            str(seed),
            "--steps",
            str(self.steps(steps)),
            "--resume",
        ]
        arguments += ["--context-length", str(CONTEXT * self.unit), "--batch-size", str(BATCH), *options]
        settings = [f"meta_gradient={kind}"] if method == "e2e" else []
        if not any(setting.startswith("recompute=") for setting in sets):
            settings += [f'recompute="{RECOMPUTE.get(kind, "none")}"']
        for setting in (*settings, *sets, *self.sets):
            arguments += ["--set", setting]
        return Command(tuple(arguments), self.run_of(name) / "model" / "config.json")

    def evaluation(self, name: str, units: int, *, data: str = "validation", options: Sequence[str] = ()) -> Command:
        """The first `units` windows of each validation book: learning and frozen."""
        length, result = self.shown(units) * self.unit, self.result_of(name, f"{data}-{units}")
        lengths = [str(length >> i) for i in range(12) if length >> i >= self.unit]
        arguments = [
            "evaluate",
            str(self.run_of(name)),
            "--data",
            str(self.data / data),
            "--max-tokens",
            str(length + 1),
        ]
        return Command((*arguments, "--lengths", *lengths[::-1], *options, "--json", str(result)), result)

    def size(self, name: str) -> Command:
        """What a session of the model takes."""
        result = self.result_of(name, "size")
        return Command(("estimate", str(self.run_of(name)), "--precision", "bfloat16", "--json", str(result)), result)

    def model(
        self,
        name: str,
        tier: int,
        kind: str = "first-order",
        *,
        reader: str = "reader",
        data: Path | None = None,
        steps: int = STEPS,
        seed: int = 0,
        options: Sequence[str] = (),
        sets: Sequence[str] = (),
        units: int = 32,
        further: Sequence[Command] = (),
        slowness: float = 1.0,
        gibibytes: int | None = None,
        seconds: float = 0.0,
        experiment: str = "adapted",
    ) -> str:
        """A job that adapts a reader and evaluates it on the first `units` windows of each book (0: it does not).

        `further` commands follow and take `seconds`. `slowness`: of a token, × that of its kind.
        """
        train = self.training(name, kind, reader=reader, data=data, steps=steps, seed=seed, options=options, sets=sets)
        read = [self.evaluation(name, units), self.size(name)] if units else []
        tokens, read_tokens = steps * BATCH * CONTEXT * UNIT, BOOKS * units * UNIT
        reading = read_tokens / READ_PER_SECOND["frozen"]
        reading += read_tokens / READ_PER_SECOND["learning"] * (kind in ("first-order", "exact"))
        self.job(
            name,
            tier,
            [train, *read, *further],
            (reader,),
            seconds=START + BESIDE * (tokens / TOKENS_PER_SECOND[kind] + reading) * slowness + seconds,
            tokens=tokens,
            gibibytes=TRAINING[kind] if gibibytes is None else gibibytes,
            experiment=experiment,
        )
        return name


def jobs(plan: Plan) -> None:
    """The models that others need, long texts, what one dial does, and other seeds."""
    plan.convert("reader", 0)
    plan.model("first-order", 0, units=128)
    plan.model("swa", 0, "swa", units=128)
    plan.model("full", 0, "full")
    long_text(plan, "first-order", 1)
    plan.model("exact", 1, "exact")
    for dial in dials(plan):
        reader = f"reader-{dial.name}" if dial.conversion else "reader"
        if dial.conversion:
            plan.convert(reader, dial.tier, *dial.conversion)
        given: dict[str, Any] = {"reader": reader, "options": dial.options, "sets": dial.sets}
        given |= {"slowness": dial.slowness, "gibibytes": dial.gibibytes}
        plan.model(f"dial-{dial.name}", dial.tier, steps=DIAL_STEPS, **given, experiment="dials")
        if dial.name == DEEPER:
            plan.model(DEEPER, 1, units=128, **given)
            long_text(plan, DEEPER, 3)
    for seed in (1, 2):
        plan.model(f"first-order-s{seed}", 4, seed=seed)
        plan.model(f"swa-s{seed}", 4, "swa", seed=seed)


def long_text(plan: Plan, name: str, tier: int) -> None:
    """All validation books as one text, 1M tokens of it, with a length for each sixteenth."""
    units, result = plan.shown(1024), plan.result_of(f"long-{name}", "joined")
    arguments = ["evaluate", str(plan.run_of(name)), "--data", str(plan.data / "joined"), "--json", str(result)]
    arguments += ["--max-tokens", str(units * plan.unit + 1), "--lengths"]
    arguments += [str(units * plan.unit * part // 16) for part in range(1, 17)]
    plan.job(f"long-{name}", tier, [Command(tuple(arguments), result)], (name,), seconds=120)


@dataclass(frozen=True)
class Dial:
    """One thing that differs from the base: at conversion, in options of training or in settings."""

    name: str
    tier: int
    conversion: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    slowness: float = 1.0
    """A guess, to plan with."""
    gibibytes: int | None = None
    """Measured (experiments/2026-12-01_adapted) or counted on from there: by the fast weights of its mini-batches."""


DEEPER = "suffix-15"
"""The dial that is trained as long as the base, too."""


def dials(plan: Plan) -> list[Dial]:
    """In the order of what is expected of them. The base: `plan.SUFFIX` blocks, window 1024, mini-batch 256, rate and
    clip 1, fast MLPs as wide as the others."""
    unit = plan.unit
    whole = ("micro_batch_size=4", 'recompute="none"')
    return [
        Dial("base", 1),
        Dial(DEEPER, 1, ("--suffix", "15"), sets=whole, slowness=1.5, gibibytes=56),
        Dial("mini-batch-512", 2, options=("--mini-batch", str(unit // 2)), slowness=0.9, gibibytes=47),
        Dial("low-rank-64", 2, sets=("inner.optimizer=low-rank-64",), slowness=1.1, gibibytes=50),
        Dial("inner-lr-2", 3, sets=("inner.lr=2", "inner.warmup_from=0.2")),
        Dial("window-2048", 2, options=("--window", str(2 * unit)), slowness=1.1),
        Dial("suffix-4", 2, ("--suffix", "4"), slowness=0.8, gibibytes=44),
        Dial("suffix-30", 3, ("--suffix", "30"), sets=whole, slowness=2.5, gibibytes=84),
        Dial("mini-batch-128", 3, options=("--mini-batch", str(unit // 8)), slowness=1.4, gibibytes=84),
        Dial("fast-hidden-384", 3, ("--fast-hidden", plan.hidden(384)), slowness=0.9, gibibytes=46),
        Dial("clip-none", 3, sets=("inner.clip=null",)),
        Dial("inner-lr-0.5", 3, sets=("inner.lr=0.5", "inner.warmup_from=0.05")),
        Dial("window-512", 3, options=("--window", str(unit // 2))),
        Dial("mini-batch-1024", 3, options=("--mini-batch", str(unit)), slowness=0.9, gibibytes=42),
        Dial("low-rank-16", 3, sets=("inner.optimizer=low-rank-16",), slowness=1.1, gibibytes=50),
        Dial("clip-0.25", 3, sets=("inner.clip=0.25",)),
        Dial("fast-hidden-768", 3, ("--fast-hidden", plan.hidden(768)), slowness=0.95, gibibytes=50),
        Dial("window-4096", 3, options=("--window", str(4 * unit)), slowness=1.3, gibibytes=66),
    ]
