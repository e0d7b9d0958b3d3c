"""Agents that think before they act: trains and evaluates many at once, and makes the page of what came out.

    python -m experiments.thinking run --out work --part 1/4 --device cuda
    python -m experiments.thinking page work experiments/DATE_thinking

A job is a cohort: every seed with every combination withheld, side by side. `run` does the jobs of its part that have
no OUT/JOB.json yet; parts may run at the same time on one GPU. At the deadline, or at a signal, the job in hand leaves
a checkpoint, and the next call goes on. `--rehearse` does the same with tiny cohorts in a minute, to try the machine.

Every choice was made with permutation seed 0; the clean test is permutation seed 1, run once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import string
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from experiments.page import as_stored, write
from experiments.pages import thinking as page
from torch import Tensor

from longread import files, record
from longread.thinking import (
    Cohort,
    ModelTraining,
    ThinkingConfig,
    WorldConfig,
    as_svg,
    certified_set,
    open_thinker,
    think,
)
from longread.thinking.conditions import AT_ONCE, CONDITIONS, MODEL, SIMULATOR, BoardEvaluation, evaluate_agents
from longread.thinking.draws import choose
from longread.thinking.tasks import coverage, draw_legal, random_play
from longread.thinking.trials import outcomes
from longread.thinking.world_model import WorldModel

BOARDS = 400
MODEL_STEPS = (100, 200, 400, 800)
"""At which world models are kept for Figure 3, beside the finished ones."""
NO_MODEL = ModelTraining(steps=0)
"""Where thinking is measured in the simulator alone: the models of the main job are as good."""
RICH = WorldConfig(curtain_rows=4, empty_chance=0.6, permutation_seed=1)
TUNED, CLEAN = WorldConfig(permutation_seed=0), WorldConfig(permutation_seed=1)
LONG = 2500
CHECKPOINT_EVERY = 60.0


def jobs() -> dict[str, ThinkingConfig]:
    """Every job by name, the most important ones first, so that four parts take about equally long."""
    found = {
        "main": ThinkingConfig(world=CLEAN),
        "tuned": ThinkingConfig(world=TUNED),
        "random": ThinkingConfig(world=CLEAN, world_model=NO_MODEL, iterations=LONG),
        "swapped": ThinkingConfig(world=CLEAN, world_model=NO_MODEL, iterations=LONG, swapped_share=0.25),
        "fast-mlp": ThinkingConfig(world=CLEAN, memory="fast_mlp"),
    }
    plain = ThinkingConfig(world=CLEAN, world_model=NO_MODEL, iterations=LONG)
    for name in ("gap", "gap_unsolved", "learnability", "sequence_gap"):
        found[name] = dataclasses.replace(plain, selection=name)
    found["gap-fresh"] = dataclasses.replace(plain, selection="gap", fresh=plain.replaced)
    found["rich-random"] = dataclasses.replace(plain, world=RICH)
    found["recurrent"] = ThinkingConfig(world=CLEAN, iterations=LONG, agent="recurrent")
    for name in ("gap", "gap_unsolved", "learnability"):
        found[f"rich-{name}"] = dataclasses.replace(plain, world=RICH, selection=name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    run = actions.add_parser("run", help="train and evaluate")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--part", default="1/1", metavar="I/N", help="the jobs I, I + N, I + 2N, …")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--seconds", type=float, default=1e9, help="after which no further step is taken")
    run.add_argument("--only", nargs="+", metavar="JOB", choices=[*jobs()])
    run.add_argument("--seeds", type=int, default=5, help="of each combination (default 5)")
    run.add_argument("--rehearse", action="store_true")
    run.set_defaults(do=run_part)
    made = actions.add_parser("page", help="make the page")
    made.add_argument("work", type=Path)
    made.add_argument("folder", type=Path)
    made.set_defaults(do=make_page)
    options = parser.parse_args()
    return int(options.do(options))


def make_page(options: argparse.Namespace) -> int:
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.work.glob("*.json"))}
    stored = as_stored(results)
    write(options.folder, page.HEADING, stored, list(page.tables({"results": stored})), page.plots(stored))
    thinker = open_thinker()
    board = certified_set(thinker.world, thinker.config.withheld, 2).cells[1]
    (options.folder / "thought.svg").write_text(as_svg(think(thinker, board), thinker.world), encoding="utf-8")
    return 0


def run_part(options: argparse.Namespace) -> int:
    """Does the jobs of a part; 75 if something is left to do."""
    part, parts = map(int, options.part.split("/"))
    wanted = {name: config for name, config in jobs().items() if options.only is None or name in options.only}
    mine = list(wanted.items())[part - 1 :: parts]
    deadline, stopped = time.monotonic() + options.seconds, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(True))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, config in (job for job in mine if not (options.out / f"{job[0]}.json").exists()):
        job = Job(name, rehearsed(config) if options.rehearse else config, options)
        if not job.train(lambda: bool(stopped) or time.monotonic() > deadline):
            print(f"{name}: stopped after step {job.cohort.step} of {job.cohort.steps}", flush=True)
            return 75
        (options.out / f"{name}.json").write_text(json.dumps(job.results()) + "\n", encoding="utf-8")
        job.checkpoint.unlink(missing_ok=True)
        print(f"{name}: {job.seconds:.0f} s", flush=True)
    return 0


def rehearsed(config: ThinkingConfig) -> ThinkingConfig:
    model = dataclasses.replace(config.world_model, steps=min(config.world_model.steps, 12), width=8, boards=60)
    small = {"width": 16, "key_width": 8, "teacher_width": 8, "boards": 8, "population": 64, "trials": 2}
    return dataclasses.replace(config, world_model=model, iterations=6, **small)


class Job:
    """A cohort that trains, is looked at now and then, and evaluated in the end."""

    def __init__(self, name: str, config: ThinkingConfig, options: argparse.Namespace) -> None:
        self.name, self.config, self.small = name, config, options.rehearse
        seeds = range(1 if self.small else options.seeds)
        letters = string.ascii_lowercase[: config.world.families]
        self.triples = ["".join(names) for names in combinations(letters, 3)]
        self.seeds = [seed for seed in seeds for _ in self.triples]
        self.withheld = [triple for _ in seeds for triple in self.triples]
        self.cohort = Cohort(config, seeds=self.seeds, withheld=self.withheld, device=options.device)
        self.sets = {t: certified_set(self.cohort.world, t, 4 if self.small else BOARDS) for t in self.triples}
        self.every, self.most_trials = (3, 3) if self.small else (250, 16)
        self.model_steps = (3, 6) if self.small else MODEL_STEPS
        self.checkpoint = options.out / "checkpoints" / f"{name}.safetensors"
        self.curve: list[dict[str, Any]] = []
        self.kept: dict[str, Tensor] = {}
        self.seconds = 0.0
        if self.checkpoint.exists():
            self.restore()

    def train(self, stopped: Callable[[], bool]) -> bool:
        """Whether it came to the end."""
        cohort, begun, saved = self.cohort, time.monotonic() - self.seconds, time.monotonic()
        figures: dict[str, list[list[float]]] = {"pre": [], "post": []}
        while cohort.step < cohort.steps:
            if stopped() or time.monotonic() - saved > CHECKPOINT_EVERY:
                self.seconds, saved = time.monotonic() - begun, time.monotonic()
                self.save()
                if stopped():
                    return False
            row = cohort.advance()
            if cohort.step in self.model_steps and cohort.step < self.config.world_model.steps:
                weights = cohort.model.state_dict().items()
                self.kept |= {f"{cohort.step}.{name}": value.clone() for name, value in weights}
            iteration = cohort.step - self.config.world_model.steps
            for name, rows in figures.items():
                rows.extend([row[name]] if name in row else [])
            if iteration > 0 and iteration % self.every == 0:
                self.curve.append({"iteration": iteration, **self.look(figures)})
                figures = {"pre": [], "post": []}
        self.seconds = time.monotonic() - begun
        return True

    def look(self, figures: dict[str, list[list[float]]]) -> dict[str, Any]:
        """Success in training since the last look, and on every set of boards at once and after thinking."""
        training = {
            f"training {name}": [sum(each) / len(each) for each in zip(*rows, strict=True)]
            for name, rows in figures.items()
            if rows
        }
        found = self.evaluations(None, conditions=(AT_ONCE, SIMULATOR), tries=1)
        return training | {name: self.by_novelty(found, name) for name in (AT_ONCE, SIMULATOR)}

    def results(self) -> dict[str, Any]:
        """What OUT/JOB.json holds."""
        learns_world = self.config.world_model.steps > 0
        model = self.cohort.model if learns_world else None
        found = self.evaluations(
            model, conditions=CONDITIONS if learns_world else (AT_ONCE, SIMULATOR), curve=self.most_trials
        )
        names = next(iter(found.values())).success
        results = {
            "config": self.config.as_dict(),
            "seeds": self.seeds,
            "withheld": self.withheld,
            "success": {name: self.by_novelty(found, name) for name in names},
            "by set": {t: {name: rates.tolist() for name, rates in e.success.items()} for t, e in found.items()},
            "by trials": self.own(found, lambda e: e.by_trials),
            "chance": {t: e.chance for t, e in found.items()},
            "boards sha256": {t: e.sha256 for t, e in found.items()},
            "recall": self.own(found, lambda e: e.quality.recall) if learns_world else None,
            "precision": self.own(found, lambda e: e.quality.precision) if learns_world else None,
            "curve": self.curve,
            "seconds": self.seconds,
            "commit": record.code_commit(),
            "hardware": record.hardware(),
        }
        if self.name in ("main", "tuned"):
            results |= {"world models": self.by_model_steps(), "coverage": self.coverage(), "cloning": self.cloning()}
        return results

    def evaluations(self, model: WorldModel | None, **options: Any) -> dict[str, BoardEvaluation]:
        cohort = self.cohort
        return {t: evaluate_agents(cohort.world, cohort.agent, model, boards, cohort.draws, trials=self.config.trials,
                                   **options) for t, boards in self.sets.items()}  # fmt: skip

    def by_novelty(self, found: dict[str, BoardEvaluation], condition: str) -> dict[str, list[float]]:
        """Of each agent, success on what was withheld from it, and the mean over the other combinations."""
        rates = {t: e.success[condition].tolist() for t, e in found.items()}
        seen = [sum(rates[t][i] for t in rates if t != own) / (len(rates) - 1) for i, own in enumerate(self.withheld)]
        return {"withheld": [rates[own][i] for i, own in enumerate(self.withheld)], "seen": seen}

    def own(self, found: dict[str, BoardEvaluation], part: Callable[[BoardEvaluation], Tensor | None]) -> list[Any]:
        """Of each agent, what was found on the boards that were withheld from it."""
        parts = {t: part(e) for t, e in found.items()}
        return [value[i].tolist() for i, own in enumerate(self.withheld) if (value := parts[own]) is not None]

    def by_model_steps(self) -> dict[str, Any]:
        """Figure 3: the same agents, thinking in world models that were trained for fewer steps."""
        results = {}
        for step in sorted({int(name.partition(".")[0]) for name in self.kept}):
            model = WorldModel(self.cohort.world, self.cohort.draws, self.config.world_model.width)
            state = {name.partition(".")[2]: value for name, value in self.kept.items() if name.startswith(f"{step}.")}
            model.load_state_dict(state)
            found = self.evaluations(model.to(self.cohort.world.device), conditions=(MODEL,))
            results[str(step)] = {
                "success": self.by_novelty(found, MODEL)["withheld"],
                "recall": self.own(found, lambda e: e.quality.recall),
                "precision": self.own(found, lambda e: e.quality.precision),
            }
        return results

    def coverage(self) -> dict[str, Any]:
        """How often each tint met each family in the first boards of the world model's training, by combination."""
        cohort, draws = self.cohort, self.cohort.draws.of("transitions")
        cells = draw_legal(cohort.world, draws.of("boards", 0), cohort.rule, self.config.world_model.boards)
        counts = coverage(cohort.world, random_play(cohort.world, draws.of("plans", 0), cells))
        return {t: counts[self.withheld.index(t)].tolist() for t in self.triples}

    def cloning(self) -> dict[str, Any]:
        """The upper bound of reactive learning: the same slow network, taught winning plans found by brute force."""
        config = dataclasses.replace(self.config, world_model=NO_MODEL)
        cohort = Cohort(config, seeds=self.seeds, withheld=self.withheld, device=self.cohort.world.device)
        optimizer = torch.optim.Adam(cohort.agent.parameters())
        for step in range(config.iterations):
            draws = cohort.draws.of("cloning", step)
            cells = draw_legal(cohort.world, draws, cohort.rule, config.boards * config.copies)
            known = outcomes(cohort.world, cohort.world.step, cells)
            wins = known.success.flatten(-2).double()
            plan = choose(wins + ~known.solvable[..., None], draws.of("plan").uniform(wins.shape[1]))
            log_policy = torch.log_softmax(cohort.agent.view(cells).slow, -1)
            both = torch.stack([plan // cohort.world.actions, plan % cohort.world.actions], -1)[..., None]
            loss = -(log_policy.gather(-1, both)[..., 0].sum(-1) * known.solvable).mean(1).sum()
            optimizer.param_groups[0]["lr"] = config.lr * (1 - 0.9 * step / config.iterations)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = {t: evaluate_agents(cohort.world, cohort.agent, None, boards, cohort.draws, conditions=[AT_ONCE])
                 for t, boards in self.sets.items()}  # fmt: skip
        return self.by_novelty(found, AT_ONCE)

    def save(self) -> None:
        tensors = self.cohort.tensors() | {f"kept.{name}": value for name, value in self.kept.items()}
        state = {
            "step": self.cohort.step,
            "curve": self.curve,
            "seconds": self.seconds,
            "config": self.config.as_dict(),
        }
        files.write_tensors_atomically(self.checkpoint, tensors, state, kind="thinking experiment")

    def restore(self) -> None:
        tensors, state = files.read_tensors(self.checkpoint, kind="thinking experiment")
        if state["config"] != self.config.as_dict():
            raise SystemExit(f"{self.checkpoint} is of another config; delete it")
        self.cohort.restore(state["step"], tensors)
        self.curve, self.seconds = state["curve"], state["seconds"]
        device = self.cohort.world.device
        self.kept = {n.removeprefix("kept."): v.to(device) for n, v in tensors.items() if n.startswith("kept.")}


if __name__ == "__main__":
    sys.exit(main())
