"""The report of an evaluation of one agent: figures, and the reasons for them in sentences."""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from typing import Any

from longread.config import UserError
from longread.thinking.conditions import AT_ONCE, CONDITIONS, MODEL, SIMULATOR, BoardEvaluation, evaluate_agents
from longread.thinking.draws import Draws
from longread.thinking.tasks import certified_set
from longread.thinking.thinker import Thinker
from longread.thinking.world_model import damaged

FORMAT = "longread-thinking/1"
GOOD_MODEL = 0.95
"""Recall and precision of winning plans at which a world model is as good as the simulator, for our purposes."""
MOST_AT_ONCE_WITHHELD, LEAST_AT_ONCE_SEEN = 0.2, 0.5
"""Success at K = 0 by which a combination counts as novel, not only as hard."""
WORTH = 0.1
"""Least gain that is called one."""


@dataclass(frozen=True)
class Report:
    """One agent on boards of the combination that was withheld from it, and of those that were not."""

    evaluations: dict[str, BoardEvaluation]
    """By combination; the withheld one first."""
    withheld: str
    damage: float

    @property
    def of_withheld(self) -> BoardEvaluation:
        return self.evaluations[self.withheld]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        found = {}
        for families, evaluation in self.evaluations.items():
            found[families] = {
                "seen_in_training": families != self.withheld,
                "boards": evaluation.boards,
                "tries": evaluation.tries,
                "trials": evaluation.trials,
                "boards_sha256": evaluation.sha256,
                "chance": evaluation.chance,
                "world_model": {
                    "recall": float(evaluation.quality.recall),
                    "precision": float(evaluation.quality.precision),
                },
                "success": {name: float(rate) for name, rate in evaluation.success.items()},
                "real_drops": evaluation.drops,
            }
            if evaluation.by_trials is not None:
                found[families]["success_by_trials"] = evaluation.by_trials[0].tolist()
        return {"format": FORMAT, "withheld": self.withheld, "damage": self.damage, "combinations": found,
                "reasons": self.reasons()}  # fmt: skip

    def reasons(self) -> list[str]:
        """Why the figures are what they are."""
        found, quality = self.of_withheld, self.of_withheld.quality
        at_once, model, simulator = (float(found.success[name]) for name in (AT_ONCE, MODEL, SIMULATOR))
        recall, precision = float(quality.recall), float(quality.precision)
        gain = f"Thinking takes success on {self.withheld} from {at_once:.2f} to {model:.2f}"
        if min(recall, precision) >= GOOD_MODEL:
            said = f"{gain}; the world model knows {recall:.0%} of the plans that win, so the simulator adds nothing."
            if model < at_once + WORTH:
                said = f"{gain}: the world model is right, but the agent makes nothing of its trials."
        else:
            said = (
                f"{gain}, and with the simulator in place of the world model to {simulator:.2f}: the world model knows "
                f"only {recall:.0%} of the plans that win, and of those that it says win {precision:.0%} do."
            )
        reasons = [said]
        if self.damage:
            reasons.append(
                f"The world model was damaged on purpose: noise of {self.damage:g} times its weights' spread."
            )
        others = [float(e.success[AT_ONCE]) for families, e in self.evaluations.items() if families != self.withheld]
        if others:
            novel = at_once <= MOST_AT_ONCE_WITHHELD and min(others) >= LEAST_AT_ONCE_SEEN
            kind = "novel to it" if novel else "hard, not novel"
            reasons.append(
                f"At once it solves {at_once:.2f} of {self.withheld}, and {min(others):.2f} or more of combinations "
                f"that it has seen: {self.withheld} is {kind}."
            )
        return reasons


def evaluate(
    thinker: Thinker,
    *,
    boards: int = 400,
    tries: int = 4,
    trials: int | None = None,
    seen: bool = True,
    damage: float = 0.0,
    seed: int = 0,
) -> Report:
    """How well an agent acts at once and after thinking, with every control.

    Args:
        boards: of each combination, each certified to be solvable.
        tries: copies that try each board, each for itself and once.
        trials: K, mental trials; None: as in training.
        seen: also boards of the combinations that were not withheld, as many families each.
        damage: noise that is added to the world model's weights before, in multiples of their standard deviation.
        seed: of the boards and of all luck.

    Raises:
        UserError: a number is out of range.
    """
    trials = thinker.config.trials if trials is None else trials
    for name, value, least in (
        ("boards", boards, 1),
        ("tries", tries, 1),
        ("trials", trials, 0),
        ("damage", damage, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if damage:
        thinker = Thinker.of(thinker.config, thinker.weights, thinker.provenance, thinker.world.device)
        damaged(thinker.model, damage, seed)
    withheld = thinker.config.withheld
    letters = string.ascii_lowercase[: thinker.config.world.families]
    others = ["".join(names) for names in itertools.combinations(letters, len(withheld))] if seen else []
    evaluations = {}
    for families in dict.fromkeys([withheld, *(o for o in others if set(o) != set(withheld))]):
        is_withheld = families == withheld
        conditions: tuple[str, ...] = CONDITIONS if is_withheld else (AT_ONCE, MODEL, SIMULATOR)
        evaluations[families] = evaluate_agents(
            thinker.world,
            thinker.agent,
            thinker.model,
            certified_set(thinker.world, families, boards, seed),
            Draws.from_seeds([seed], thinker.world.device),
            trials=trials,
            tries=tries,
            conditions=conditions,
            curve=max(16, trials) if is_withheld else None,
        )
    return Report(evaluations, withheld, damage)
