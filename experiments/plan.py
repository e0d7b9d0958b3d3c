"""What the small experiments train and evaluate, as a list of jobs in order of importance.

A job is a chain of `longread` commands in one process: usually a training run and the evaluations of its model. Scale
window : mini-batch : pre-training : longest context as 8K : 1K : 8K : 256K divided by 8. All lengths are multiples of
`unit`, 1024 but in a rehearsal; `scale` multiplies every number of steps, so that methods always see equal tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from experiments.equal import LENGTHS as EQUAL_LENGTHS, RUNS, EqualRun

from longread.recipes import Method

UNIT = 1024
"""Tokens of the pre-training context, and of the window."""
PRETRAINING_STEPS = 1000
"""Of 64 units of tokens each: 65.5M tokens."""
BOX_STEPS = 4000
BOX_EXTENSIONS = {8: 150, 32: 100}
"""Context length in units -> steps of 128 units."""
EXTENSION_STEPS = 200
"""Of 128 units: 40 % of the tokens of pre-training. With 10 % full attention does not recover from its new rotary
base."""
RATE_STEPS = 200
"""Of pre-training, to compare rates."""
LADDER = (2, 4, 8, 16, 32)
"""Context lengths of extension, in units."""
BOXED = "box-32"
"""The job whose model goes into the box."""
METHODS = ("e2e", "swa", "full", "hybrid", "naive", "gdn", "mamba2", "kvb")
SPEEDS = dict.fromkeys(METHODS, 3.5e6) | {"e2e": 1.6e6, "kvb": 0.7e6, "mamba2": 1e6, "gdn": 1e6}
"""Tokens a second of training at one unit on an H200; of the recurrences without kernels a guess."""
DOUBLES = {"e2e": 16, "kvb": 16, "full": 6}
"""Context length, in units, at which a token takes twice the time, about; of others 32."""
WEIGHTS = {"e2e": 3, "kvb": 3, "mamba2": 3, "gdn": 3}
"""Share of a GPU's room that a job takes, of memory mostly: up to 60 GiB; others take 1, and larger models 1 more."""
OVERHEAD = 20.0
"""Seconds of a job beside its training: start, capture, evaluation."""


@dataclass(frozen=True)
class Command:
    """Arguments of `longread`, or `-m MODULE` and those of its `main`; `makes` exists once it is done."""

    arguments: tuple[str, ...]
    makes: Path


@dataclass(frozen=True)
class Job:
    name: str
    tier: int
    commands: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    method: str = "e2e"
    tokens: int = 0
    context: int = 0
    experiment: str = ""
    slowness: float = 1.0
    """Seconds of a token, × those of the small model."""

    @property
    def weight(self) -> int:
        return 1 if self.experiment == "toy" else WEIGHTS.get(self.method, 1) + (self.slowness > 1)

    @property
    def estimated_seconds(self) -> float:
        """With a GPU for itself."""
        seconds = self.tokens / SPEEDS[self.method] * self.slowness
        return OVERHEAD + seconds * (1.0 + (self.context - 1) / DOUBLES.get(self.method, 32))


@dataclass
class Plan:
    """Makes the jobs, given where data lie and results go."""

    data: Path
    work: Path
    unit: int = UNIT
    scale: float = 1.0
    sets: tuple[str, ...] = ()
    """Further `--set` of every training run."""
    documents: int | None = None
    """To evaluate on; None: all."""
    jobs: list[Job] = field(default_factory=list)

    def run_of(self, name: str) -> Path:
        return self.work / "runs" / name

    def result_of(self, name: str, what: str) -> Path:
        return self.work / "results" / name / f"{what}.json"

    @property
    def first_documents(self) -> tuple[str, ...]:
        return () if self.documents is None else ("--documents", str(self.documents))

    def steps(self, steps: int) -> int:
        return max(2, round(steps * self.scale))

    def train(
        self, name: str, method: str, context: int, steps: int, seed: int, init: str | None, sets: Sequence[str]
    ) -> Command:
        warmup = max(1, steps // 10)
        recipe = "small" if init is None else "small-extend"
        settings = [f"steps={steps}", f"optimizer.decay_steps={steps}", f"optimizer.warmup_steps={warmup}"]
        settings += [f"inner.warmup_steps={warmup}"] if init is None and "inner.warmup_steps=0" not in sets else []
        settings += ["optimizer.initial_lr=0", f"name={name}", 'recompute="none"', *sets, *self.sets]
        arguments = ["train", recipe, "--method", method, "--context-length", str(context * self.unit)]
        arguments += [
            "--data",
            str(self.data / "train"),
            "--out",
            str(self.run_of(name)),
            "--seed",
            str(seed),
            "--resume",
        ]
        arguments += ["--init", str(self.run_of(init))] if init else []
        for setting in settings:
            arguments += ["--set", setting]
        return Command(tuple(arguments), self.run_of(name) / "model" / "config.json")

    def evaluations(
        self, name: str, contexts: Sequence[int], kinds: Sequence[str] = ("books", "code")
    ) -> Iterator[Command]:
        """The model on held-out text cut into stretches of each context, in units."""
        for kind in kinds:
            for context in contexts:
                length = context * self.unit
                result = self.result_of(name, f"{kind}-{context}")
                lengths = [str(length >> i) for i in range(8) if length >> i >= self.unit]
                yield Command(
                    (
                        *("evaluate", str(self.run_of(name)), "--data", str(self.data / f"{kind}-{context}")),
                        *("--max-tokens", str(length + 1), "--batch-size", str(min(192, max(24, 1024 // context)))),
                        *("--lengths", *lengths, "--json", str(result), *self.first_documents),
                    ),
                    result,
                )

    def model(
        self,
        name: str,
        tier: int,
        method: str,
        context: int,
        steps: int,
        *,
        seed: int = 0,
        init: str | None = None,
        sets: Sequence[str] = (),
        contexts: Sequence[int] | None = None,
        kinds: Sequence[str] = ("books", "code"),
        experiment: str,
        slowness: float = 1.0,
    ) -> str:
        """A job that trains a model and evaluates it, by default at the context it was trained at."""
        if method not in get_args(Method):
            return name
        steps = self.steps(steps)
        if experiment not in ("rates", "stability", "toy"):
            sets = (*CHOSEN.get(method, ()), *sets)
        commands = [self.train(name, method, context, steps, seed, init, sets)]
        commands += self.evaluations(name, [context] if contexts is None else contexts, kinds)
        tokens = steps * (64 if init is None else 128) * self.unit
        needs = () if init is None else (init,)
        self.jobs.append(Job(name, tier, tuple(commands), needs, method, tokens, context, experiment, slowness))
        return name

    def ladder(self, tier: int, method: str, seed: int = 0, lengths: Sequence[int] = LADDER) -> str:
        """Pre-training at one unit and, from there, an extension to each length: the paper's Figure 1."""
        base = f"{method}-s{seed}"
        self.model(base, tier, method, 1, PRETRAINING_STEPS, seed=seed, experiment="context")
        for length in lengths:
            self.model(
                f"{base}-{length}",
                tier,
                method,
                length,
                EXTENSION_STEPS,
                seed=seed,
                init=base,
                contexts=(1, 4, length) if length == 32 else (length,),
                experiment="context",
            )
        return base

    def longer(
        self,
        name: str,
        tier: int,
        method: str,
        share: float,
        lengths: Sequence[int],
        seed: int,
        sets: Sequence[str] = (),
    ) -> None:
        """As `ladder`, with so many times the steps."""
        steps = round(PRETRAINING_STEPS * share)
        self.model(name, tier, method, 1, steps, seed=seed, sets=sets, experiment="meta")
        for length in lengths:
            steps = round(EXTENSION_STEPS * share)
            self.model(
                f"{name}-{length}", tier, method, length, steps, seed=seed, init=name, sets=sets, experiment="meta"
            )

    def equal(self, tier: int, run: EqualRun, seed: int) -> None:
        """Pre-training and extensions of one of `experiments.equal`."""
        base = f"{run.name}-s{seed}"
        for length in (1, *EQUAL_LENGTHS):
            extension = length > 1
            self.model(
                f"{base}-{length}" if extension else base,
                tier,
                run.method,
                length,
                round((EXTENSION_STEPS if extension else PRETRAINING_STEPS) * run.share(length * UNIT)),
                seed=seed,
                init=base if extension else None,
                sets=run.settings(extension),
                experiment="equal",
                slowness=run.slowness,
            )


def jobs(plan: Plan) -> list[Job]:
    """All jobs, the most important first. Methods that this Longread does not have are left out."""
    unit = plan.unit

    # the model in the box, and its twins: equal tokens
    for name, method, tier in (("box", "e2e", 0), ("twin-swa", "swa", 6), ("twin-full", "full", 6)):
        plan.model(name, tier, method, 1, BOX_STEPS, experiment="box")
        plan.model(f"{name}-8", tier, method, 8, BOX_EXTENSIONS[8], init=name, experiment="box")
        plan.model(
            f"{name}-32", tier, method, 32, BOX_EXTENSIONS[32], init=f"{name}-8", contexts=(1, 8, 32, 64),
            experiment="box",
        )  # fmt: skip

    # the rates of each method, before anything else is said of it
    for method, table in RATES.items():
        for name, settings in table.items():
            plan.model(
                f"rate-{method}-{name}", 1, method, 1, RATE_STEPS, sets=settings, kinds=("books",), experiment="rates"
            )

    # b, c: loss by context length and by token index
    for method in ("e2e", "full", "swa"):
        plan.ladder(1, method)
    for method in ("hybrid", "gdn", "mamba2", "kvb", "naive"):
        plan.ladder(2, method, lengths=(32, 8, 2, 16, 4))

    # f, g: needles, and how well models continue a text
    probes(plan, 3)

    # h: meta-gradients at equal tokens, and first-order at equal operations
    for name, (settings, share, seeds) in META_GRADIENTS.items():
        lengths = (8, 32) if name == "first-order-longer" else (8,)
        for seed in seeds:
            plan.longer(f"meta-{name}-s{seed}", 2, "e2e", share, lengths, seed, settings)

    # what the operations of TTT-E2E buy when they are spent on tokens
    for seed in (0, 1, 2):
        plan.longer(f"swa-longer-s{seed}", 2, "swa", SWA_LONGER, (8, 32), seed)

    # two more seeds of what is claimed
    for seed in (1, 2):
        for method in ("e2e", "full", "swa"):
            plan.ladder(3, method, seed, (32, 8, 2, 16, 4))
        for method in ("hybrid", "gdn", "mamba2", "naive", "kvb"):
            plan.ladder(4, method, seed, (32, 8, 16, 2, 4))

    # 4: what makes training diverge or stall
    for name, settings in STABILITY.items():
        plan.model(f"stable-{name}", 4, "e2e", 1, 200, sets=settings, kinds=("books",), experiment="stability")

    # d: window, mini-batch, suffix blocks, at half of the tokens
    for name, (method, settings) in ablations(unit).items():
        plan.model(
            f"ablate-{name}",
            5,
            method,
            1,
            PRETRAINING_STEPS // 2,
            sets=settings,
            kinds=("books",),
            experiment="ablation",
        )
    for name in ("suffix-1", "suffix-4", "e2e"):
        settings = ablations(unit)[name][1]
        plan.model(
            f"ablate-{name}-8", 5, "e2e", 8, PRETRAINING_STEPS // 20, sets=settings, init=f"ablate-{name}",
            kinds=("books",), experiment="ablation",
        )  # fmt: skip

    # e: from key-value binding to the end-to-end loss
    plan.model("kvb-simplified", 6, "kvb", 1, PRETRAINING_STEPS, sets=("model.binding.output=key",), experiment="kvb")
    every = (f"model.num_suffix_blocks={BLOCKS}", f"model.mlp_hidden={equal_hidden(BLOCKS)}")
    plan.model("e2e-every-block", 6, "e2e", 1, PRETRAINING_STEPS, sets=every, experiment="kvb")

    # a larger model that a small one can draft for
    plan.model("verifier", 6, "full", 1, VERIFIER_STEPS, sets=VERIFIER, experiment="speculative")
    plan.model("verifier-8", 6, "full", 8, EXTENSION_STEPS, init="verifier", sets=VERIFIER, experiment="speculative")

    # exactly the operations of exact TTT-E2E, and a second size
    for run in RUNS:
        for seed in run.seeds:
            plan.equal(6, run, seed)

    # a: the toy of Figure 2
    for name, (method, settings) in TOYS.items():
        toy(plan, f"toy-{name}", 7, method, settings)
    return sorted(plan.jobs, key=lambda job: job.tier)


BLOCKS, HIDDEN = 8, 640
"""Of the small recipe, before F makes room for fast MLPs."""

META_GRADIENTS = {
    "first-order": (("meta_gradient=first-order",), 1.0, (0, 1, 2)),
    "first-order-longer": (("meta_gradient=first-order",), 1.35, (0, 1, 2)),
    "cut-2": (("truncate_after=2",), 1.0, (0,)),
    "cut-2-longer": (("truncate_after=2",), 1.08, (0,)),
    "cut-4": (("truncate_after=4",), 1.0, (0,)),
}
"""Name -> settings, steps as a share of those of the exact gradient, seeds. 1.08: equal time, see
speeds.json. 1.35 was taken for equal operations, which 1.21 would be (`longread.flops`)."""
SWA_LONGER = 1.54
"""Steps of SWA as a share of its own: what was taken for the operations of TTT-E2E, which 1.35 would be."""

VERIFIER_STEPS = 3000
VERIFIER = ("model.width=512", "model.num_heads=8", "model.mlp_hidden=1280")
"""26M parameters."""

OUTER_RATES = {"1e-3": ("optimizer.lr=1e-3",), "3e-3": (), "1e-2": ("optimizer.lr=1e-2",)}
RATES: dict[str, dict[str, tuple[str, ...]]] = {
    "swa": OUTER_RATES,
    "full": OUTER_RATES,
    "gdn": OUTER_RATES,
    "mamba2": OUTER_RATES,
    "kvb": OUTER_RATES
    | {
        "inner-0.1": ("model.binding.lr=0.1",),
        "inner-0.3": ("model.binding.lr=0.3",),
        "inner-3": ("model.binding.lr=3",),
        "inner-no-clip": ("model.binding.clip=null",),
    },
}
"""Of the baselines; those of TTT-E2E are in `STABILITY`."""
CHOSEN: dict[str, tuple[str, ...]] = {"kvb": ("model.binding.lr=0.3",)}
"""Method -> settings of its runs where the search found better ones than the recipe's. For SWA, full attention, Mamba 2
and Gated DeltaNet it found none."""

STABILITY = {
    "base": (),
    "init-0.02": ("model.init_std=0.02",),
    "inner-lr-3": ("inner.lr=3",),
    "inner-lr-0.3": ("inner.lr=0.3",),
    "no-inner-clip": ("inner.clip=null",),
    "no-inner-warmup": ("inner.warmup_steps=0",),
    "lr-1e-2": ("optimizer.lr=1e-2",),
    "lr-1e-3": ("optimizer.lr=1e-3",),
}


def equal_hidden(suffix: int) -> int:
    """F with which `suffix` more MLPs leave the number of parameters as it is, to 1 %; a multiple of 16."""
    return round(HIDDEN * BLOCKS / (BLOCKS + suffix) / 16) * 16


def ablations(unit: int) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> method and settings; window and mini-batch as shares of the pre-training context."""
    table: dict[str, tuple[str, tuple[str, ...]]] = {"e2e": ("e2e", ()), "swa": ("swa", ()), "full": ("full", ())}
    for share in (2, 4, 8):
        window = (f"model.window_size={unit // share}",)
        table |= {f"window-1:{share}": ("e2e", window), f"swa-window-1:{share}": ("swa", window)}
    for share in (1, 2, 4, 16):
        table[f"mini-batch-1:{share}"] = ("e2e", (f"model.mini_batch_size={unit // share}",))
    for suffix in (1, 4):
        table[f"suffix-{suffix}"] = (
            "e2e",
            (f"model.num_suffix_blocks={suffix}", f"model.mlp_hidden={equal_hidden(suffix)}"),
        )
    return {name.replace(":", "-"): entry for name, entry in table.items()}


def probes(plan: Plan, tier: int) -> None:
    """Needles, and continuations of the length of the window, of models that the ladders left."""
    models = [f"{method}-s1-32" for method in ("e2e", "full", "swa")]
    contexts = [str(plan.unit * context) for context in (1, 2, 4, 8, 16)]
    essays = ["--haystack", str(plan.data / "text" / "books" / "validation")]
    for name in (*models, BOXED):
        result = plan.result_of(f"needle-{name}", "needle")
        arguments = ["needle", str(plan.run_of(name)), "--variants", "1", "2", "3", *essays, "--contexts", *contexts]
        arguments += [
            "--samples",
            str(min(10, plan.documents or 10)),
            "--batch-size",
            "50",
            "--max-tokens",
            "48",
            "--json",
            str(result),
        ]
        plan.jobs.append(
            Job(f"needle-{name}", tier, (Command(tuple(arguments), result),), (name,), experiment="needle")
        )
    writers = [f"{method}-s1-8" for method in ("e2e", "full", "swa")]
    for judge in (BOXED, "full-s2-32"):
        result = plan.result_of(f"judge-{judge}", "judge")
        arguments = ["judge", *(str(plan.run_of(name)) for name in writers), "--judge", str(plan.run_of(judge))]
        arguments += [
            "--data",
            str(plan.data / "books-32"),
            "--context",
            contexts[1],
            "--documents",
            str(plan.documents or 48),
        ]
        arguments += ["--batch-size", "48", "--json", str(result)]
        needs = (*writers, judge)
        plan.jobs.append(
            Job(f"judge-{judge}", tier, (Command(tuple(arguments), result),), needs, experiment="decoding")
        )


def toy(plan: Plan, name: str, tier: int, method: str, settings: Sequence[str]) -> None:
    """Two blocks of width 384 at context 128; attention sees one token, a linear map, unless the settings say else."""
    sets = ["model.num_blocks=2", "model.width=384", "model.num_heads=6", "context_length=128", "batch_size=64"]
    sets += ["model.window_size=1", "recompute=sqrt", *settings]
    steps = plan.steps(400)
    result = plan.result_of(name, "books-index")
    evaluation = ["evaluate", str(plan.run_of(name)), "--data", str(plan.data / "books-1"), "--batch-size", "192"]
    evaluation += ["--max-tokens", "129", "--lengths", "128", "--indices", *map(str, (1, 7, 15, 31, 63, 127))]
    commands = (
        plan.train(name, method, 1, steps, 0, None, sets),
        Command((*evaluation, "--json", str(result)), result),
    )
    plan.jobs.append(Job(name, tier, commands, (), method, steps * 64 * 128 * 10, 1, "toy"))


TOYS = {
    "full": ("full", ("model.mlp_hidden=1536", "model.attention=full")),
    "none": ("swa", ("model.mlp_hidden=1536",)),
    "naive": ("naive", ("model.mlp_hidden=1024", "model.num_suffix_blocks=1", "model.mini_batch_size=1")),
    "e2e-16": ("e2e", ("model.mlp_hidden=1024", "model.num_suffix_blocks=1", "model.mini_batch_size=16")),
    "e2e-1": ("e2e", ("model.mlp_hidden=1024", "model.num_suffix_blocks=1", "model.mini_batch_size=1")),
}
