"""Runs with exactly the operations of exact TTT-E2E, at two sizes: which they are, and what they are given.

The second size has five times the parameters of recipe `small`: width 512, 12 blocks, of which 3 learn in TTT-E2E, and
everything else as it is, the tokens too. Its outer rates are those of `small` times 256 / 512, for every method alike;
none was searched.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

from longread.config import MetaGradient, ModelConfig
from longread.flops import sequence_flops
from longread.recipes import Method, recipe

LARGE = {"width": 512, "num_blocks": 12, "num_heads": 8}
LARGE_HIDDEN, LARGE_SUFFIX = 1120, 3
"""Units of an MLP where none learns: with 3 more MLPs four fifths of it, 896, leave the parameters as they are."""
LARGE_RATES = {False: 1.5e-3, True: 5e-4}
"""Outer rate, by whether it is an extension."""
SLOWER = 2.4
"""Seconds of a token at the second size, × those of `small`: 4.5 times the operations at about twice the share of the
peak. A guess, for the plan alone."""
FIRST_ORDER_SECONDS = 0.77
"""Of a token, × those of exact (speeds.json)."""


@dataclass(frozen=True)
class EqualRun:
    """A training that `experiments.plan` knows by `name`: pre-training, and extensions of it."""

    name: str
    method: Method
    seeds: tuple[int, ...] = (0,)
    large: bool = False
    meta_gradient: MetaGradient = "exact"
    equal: str = "operations"
    """To exact TTT-E2E of that size: "operations" or "tokens"."""

    @property
    def slowness(self) -> float:
        """Seconds of a token, × those of exact, or of a method without learning, at the small size."""
        return (SLOWER if self.large else 1.0) * (FIRST_ORDER_SECONDS if self.meta_gradient != "exact" else 1.0)

    def settings(self, extension: bool) -> tuple[str, ...]:
        """As `--set` takes them."""
        settings = [f"meta_gradient={self.meta_gradient}"] if self.meta_gradient != "exact" else []
        if self.large:
            settings += [f"model.{name}={value}" for name, value in _large(self.method).items()]
            settings.append(f"optimizer.lr={LARGE_RATES[extension]}")
        return tuple(settings)

    def share(self, context_length: int) -> float:
        """Of the steps of exact TTT-E2E, at sequences of so many tokens."""
        if self.equal == "tokens":
            return 1.0
        return operations("e2e", self.large, context_length) / self.operations(context_length)

    def operations(self, context_length: int) -> float:
        """Of training on a token of a sequence of so many."""
        return operations(self.method, self.large, context_length, self.meta_gradient)


@cache
def operations(method: Method, large: bool, context_length: int, meta_gradient: MetaGradient = "exact") -> float:
    """Of training on a token, each product once (`longread.flops`)."""
    config = recipe("small-extend", method, context_length=context_length)
    found = sequence_flops(network(method, large), context_length, config.loss, meta_gradient=meta_gradient)
    return found.model / context_length


def network(method: Method, large: bool) -> ModelConfig:
    """What is trained; its rotary base, which depends on the context, aside."""
    model = recipe("small", method).model
    return dataclasses.replace(model, **_large(method)) if large else model


def _large(method: Method) -> dict[str, int]:
    S = LARGE_SUFFIX if method == "e2e" else 0
    L = LARGE["num_blocks"]
    return LARGE | {"mlp_hidden": LARGE_HIDDEN * L // (L + S), "num_suffix_blocks": S}


EXACT = EqualRun("e2e", "e2e", (0, 1, 2), equal="tokens")
"""At the small size, a run of another page."""
RUNS = (
    EqualRun("swa-equal", "swa", (0, 1, 2)),
    EqualRun("first-order-equal", "e2e", (0, 1, 2), meta_gradient="first-order"),
    EqualRun("large-e2e", "e2e", (0, 1, 2), large=True, equal="tokens"),
    EqualRun("large-swa", "swa", large=True, equal="tokens"),
    EqualRun("large-swa-equal", "swa", (0, 1, 2), large=True),
    EqualRun("large-first-order-equal", "e2e", (0, 1, 2), large=True, meta_gradient="first-order"),
    EqualRun("large-full", "full", large=True, equal="tokens"),
)
LENGTHS = (8, 32)
"""Of the extensions, in units of 1024 tokens."""
