"""The cases that are measured, and which of them make sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from longread.checkpoint import describe_model
from longread.config import ModelConfig, RunConfig, Update, UserError
from longread.loading import boxed_models, find_model
from longread.recipes import PRETRAINING_CONTEXT, SIZES, Method, recipe, without_fast_weights

MEASURES = {
    "train": "train_tokens_per_s",
    "first-step": "first_step_s",
    "prefill": "prefill_ms_per_1k",
    "decode": "decode_tokens_per_s",
    "first-read": "first_read_s",
    "first-token": "first_token_s",
}
"""Work, and what its rows call it."""
STARTS = ("first-step", "first-read", "first-token")
"""Works of a fresh process, in seconds."""
PARALLEL = "parallel_train_tokens_per_s"
"""The name in rows of training on several GPUs, all of them together."""
UNITS = {
    "train_tokens_per_s": "tokens/s",
    PARALLEL: "tokens/s",
    "first_step_s": "s",
    "prefill_ms_per_1k": "ms",
    "decode_tokens_per_s": "tokens/s",
    "first_read_s": "s",
    "first_token_s": "s",
}
METHODS = ("e2e", "swa", "full")
READER = "135m"
"""A size without a recipe: a pretrained network with fast MLPs, as `longread convert` makes it of SmolLM2-135M."""
SIZE_NAMES = ("toy", "small", READER, *SIZES)
UPDATES: tuple[Update, ...] = ("shared", "replicated")
MOST_GPUS = 16
LONGEST = 2**24
"""Tokens of a context, and of a training step."""
LONGEST_CACHE = 131_072
"""Tokens that full attention reads in all blocks at once; beyond, its cache would not fit any more."""
_TOKENS_A_STEP = {"toy": 8192, "small": 8192, "125m": 32_768}
"""Of one training step; one sequence where it is not given, or is shorter than that."""
_ON_A_GPU = {
    "train": (8192, 32_768),
    "first-step": (8192,),
    "prefill": (8192, 131_072, 1_048_576),
    "decode": (8192, 131_072),
    "first-read": (32_768,),
    "first-token": (8192,),
}
_ON_A_CPU = dict.fromkeys(MEASURES, (1024,)) | {"prefill": (1024, 8192)}


@dataclass(frozen=True)
class Case:
    """One thing to measure. Raises `UserError` if there is no such thing."""

    work: str
    method: str
    size: str
    context: int
    sequences: int = 1
    """Of one training step, on each GPU or group of them."""
    gpus: int = 1
    update: Update = "shared"
    state: int = 1
    """Of several GPUs, see `longread.config.Parallelism`."""

    def __post_init__(self) -> None:
        for what, value, known in (
            ("work", self.work, tuple(MEASURES)),
            ("method", self.method, METHODS),
            ("size", self.size, (self.size,) if self.work == "first-token" else SIZE_NAMES),
        ):
            if value not in known:
                raise UserError(f"there is no {what} {value!r} to measure; choose from {', '.join(known)}")
        if self.context > LONGEST:
            raise UserError(f"a context of {self.context} tokens is more than {LONGEST}; lower --contexts")
        if self.context * self.sequences > LONGEST:
            raise UserError(
                f"{self.sequences} sequences of {self.context} tokens are more than {LONGEST} tokens a step; "
                "lower --sequences"
            )
        if self.gpus > 1 and self.work != "train":
            raise UserError(f"{self.work} is measured on one GPU; leave --gpus out, or choose train")
        if self.gpus > MOST_GPUS:
            raise UserError(f"--gpus {self.gpus} is more than the {MOST_GPUS} of a machine; lower it")
        if self.gpus % self.state:
            raise UserError(f"--state-parallel {self.state} does not divide --gpus {self.gpus}; choose a divisor")
        if self.state > 1 and self.method != "e2e":
            raise UserError(f"--state-parallel divides fast MLPs, and {self.method} has none; choose e2e")
        if self.update not in UPDATES:
            raise UserError(f"--update {self.update} cannot be measured yet; choose from {', '.join(UPDATES)}")
        if self.work in ("train", "first-step") and self.fits_cache:
            _ = self.config  # refuses a context that is no multiple of the mini-batch

    def __str__(self) -> str:
        many = f" × {self.sequences}" if self.sequences > 1 else ""
        where = f" on {self.gpus} GPUs, {self.update}" if self.gpus > 1 else ""
        where += f", state parallel {self.state}" if self.state > 1 else ""
        return f"{self.work} {self.size} {self.method} {self.context}{many}{where}"

    @property
    def measure(self) -> str:
        """As rows call it."""
        return MEASURES[self.work] if self.gpus == 1 else PARALLEL

    @property
    def fits_cache(self) -> bool:
        """False for full attention over more than its cache is meant to hold, where that has to be kept."""
        return self.work == "prefill" or not self.is_beyond_cache

    @property
    def is_beyond_cache(self) -> bool:
        """Whether it is full attention over more than its cache is meant to hold."""
        return self.method == "full" and self.context > LONGEST_CACHE

    @property
    def config(self) -> RunConfig:
        """The recipe of the case; for reading and decoding its network counts only."""
        method = cast("Method", self.method)
        if self.size == READER:
            made = dataclasses.replace(self, size="125m").config
            return dataclasses.replace(made, model=_reader(method))
        if self.work in ("prefill", "decode", "first-read"):
            return recipe(self.size, method)
        if self.size in SIZES and self.context != PRETRAINING_CONTEXT:
            made = recipe(f"{self.size}-extend", method, context_length=self.context)
        else:
            made = recipe(self.size, method, context_length=None if self.size in SIZES else self.context)
        return dataclasses.replace(made, batch_size=self.sequences, micro_batch_size=None)

    @property
    def network(self) -> ModelConfig:
        """That of the recipe; for a first token, of the model in the box that `size` names."""
        return describe_model(find_model(self.size)).config if self.work == "first-token" else self.config.model

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Case:
        """The case that a row is about."""
        about = row["method"], row["size"], row["context"], row["sequences"]
        if row["measure"] == PARALLEL:
            return cls("train", *about, row["gpus"], row["update"], row["state_parallel"])
        work = next((work for work, measure in MEASURES.items() if measure == row["measure"]), row["measure"])
        return cls(work, *about)


def plan(
    works: Sequence[str] = (),
    *,
    gpu: bool,
    sizes: Sequence[str] = (),
    methods: Sequence[str] = (),
    contexts: Sequence[int] = (),
    sequences: int | None = None,
    gpus: int = 1,
    update: Update = "shared",
    state: int = 1,
) -> list[Case]:
    """All cases of what is asked for, in the order in which they are measured; what is not said has a default.

    What a fresh process does first is measured at the shortest context only, a first token with each model in the box,
    whatever `sizes` says. Raises `UserError` for a name that does not exist, and a
    context that cannot be trained.
    """
    wanted = list(dict.fromkeys(works or (MEASURES if gpus == 1 else ("train",))))
    of_work = {work: _sizes(work, sizes, methods, gpu=gpu) for work in wanted}
    cases = []
    for size in dict.fromkeys(size for found in of_work.values() for size in found):
        for work in (work for work in wanted if size in of_work[work]):
            lengths = sorted(set(contexts)) or list((_ON_A_GPU if gpu else _ON_A_CPU).get(work, ()))
            for context in lengths[:1] if work in STARTS else lengths or [0]:
                for method in ("e2e",) if work == "first-token" else dict.fromkeys(methods or METHODS):
                    training = work in ("train", "first-step")
                    count = sequences or max(1, _TOKENS_A_STEP.get(size, 0) // max(1, context)) if training else 1
                    cases.append(Case(work, method, size, context, count, gpus, update, state))
    return cases


def _sizes(work: str, sizes: Sequence[str], methods: Sequence[str], *, gpu: bool) -> Sequence[str]:
    if work == "first-token":
        return list(boxed_models()) if "e2e" in (methods or METHODS) else []
    if sizes or not gpu:
        return sizes or ("toy",)
    return (READER,) if work == "first-read" else ("125m", "760m", "3b")


def _reader(method: Method) -> ModelConfig:
    made = ModelConfig(
        vocab_size=49_152,
        width=576,
        num_blocks=30,
        num_heads=9,
        kv_heads=3,
        mlp_hidden=1536,
        window_size=1024,
        mini_batch_size=256,
        num_suffix_blocks=8,
    )
    if method == "e2e":
        return made
    return dataclasses.replace(without_fast_weights(made), attention="full" if method == "full" else "window")
