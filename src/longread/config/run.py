"""A training run: inner loop, outer optimizer, and everything else that decides its result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from longread.config.checked import Checked, UserError
from longread.config.model import ModelConfig
from longread.config.recompute import Recompute, recomputation

Loss = Literal["end-to-end", "static"]
MetaGradient = Literal["exact", "first-order"]
Precision = Literal["auto", "float64", "float32", "bfloat16"]
BadBatch = Literal["halt", "skip"]
Update = Literal["shared", "replicated", "fully-sharded"]

INNER_OPTIMIZERS = {"sgd"}
"""Names of the rules of the inner step; `longread.register_inner_optimizer` adds to them."""
MOST_RECALL = 0.5
"""Of `RunConfig.recall`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerConfig(Checked):
    """The inner loop (paper Eq. 2 and 5): one step on the fast weights a mini-batch, of clipped SGD if nothing else is
    said."""

    _path = "inner."

    lr: float = 1.0
    clip: float | None = 1.0
    """Largest norm of one sequence's gradient over all its fast weights; None: no clipping."""
    warmup_from: float = 0.1
    warmup_steps: int = 0
    """Outer steps over which the rate climbs from `warmup_from` to `lr`; 0: constant."""
    optimizer: str = field(default="sgd", metadata={"later": True})
    """The rule of the step: "sgd", or a registered one."""
    surprise: float = field(default=0.0, metadata={"later": True})
    """Exponent α: a target counts in the inner loss in proportion to its NLL to the power of α, so that what the model
    failed to predict steps harder; 0: all count alike, as in the paper."""

    def _check(self) -> None:
        self._at_least(0, "lr", "warmup_from", "warmup_steps", "surprise")
        if self.optimizer not in INNER_OPTIMIZERS:
            raise UserError(
                f"inner.optimizer is {self.optimizer!r}; it must be one of {', '.join(sorted(INNER_OPTIMIZERS))}, or "
                "be registered with longread.register_inner_optimizer before it is named"
            )
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"{self._path}clip is {self.clip}; it must be positive, or none to switch clipping off")

    def lr_at(self, step: int) -> float:
        """The inner rate during outer step `step`, counted from 0."""
        if not self.warmup_steps:
            return self.lr
        return self.warmup_from + (self.lr - self.warmup_from) * min(1.0, (step + 1) / self.warmup_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Checked):
    """The outer loop's AdamW: linear warm-up, then cosine to `end_lr` at `decay_steps`."""

    _path = "optimizer."

    lr: float
    initial_lr: float = 0.0
    end_lr: float = 1e-5
    warmup_steps: int = 0
    decay_steps: int = 1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embedding: bool = True
    clip: float | None = 1.0

    def _check(self) -> None:
        self._at_least(0, "initial_lr", "end_lr", "warmup_steps", "weight_decay")
        self._at_least(1, "decay_steps")
        if self.lr <= 0:
            raise UserError(f"optimizer.lr is {self.lr}; it must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.eps <= 0:
            raise UserError(f"optimizer.eps is {self.eps}; it must be positive")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"{self._path}clip is {self.clip}; it must be positive, or none to switch clipping off")
        if self.warmup_steps > self.decay_steps:
            raise UserError(
                f"optimizer.warmup_steps is {self.warmup_steps}; it cannot exceed optimizer.decay_steps, "
                f"{self.decay_steps}"
            )

    def lr_at(self, step: int) -> float:
        """The rate of update `step`, counted from 0: the first update of a warm-up uses `initial_lr`."""
        if step < self.warmup_steps:
            return self.initial_lr + (self.lr - self.initial_lr) * step / self.warmup_steps
        span = max(1, self.decay_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.end_lr + (self.lr - self.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Checked):
    """One training run: everything that decides its result, and nothing about where it happens."""

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    inner: InnerConfig = field(default_factory=InnerConfig)
    loss: Loss = "end-to-end"
    meta_gradient: MetaGradient = "exact"
    truncate_after: int | None = None
    """Cut the meta-gradient every so many inner steps; None: never (exact)."""
    context_length: int
    batch_size: int
    """Sequences of one outer step, over all devices."""
    micro_batch_size: int | None = None
    """Sequences computed at a time on one device; None: as many as fit. Gradients accumulate."""
    steps: int
    seed: int = 0
    recompute: Recompute = "auto"
    """What is computed again in the backward pass, for want of memory (`longread.outer_loop`)."""
    precision: Precision = "auto"
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = field(default=2, metadata={"later": True})
    """The newest so many stay."""
    milestone_every: int | None = field(default=None, metadata={"later": True})
    """Of each so many steps, one checkpoint stays for good; None: no more than `keep_checkpoints`."""
    max_bad_steps: int | None = 50
    """Steps in a row with an exploded loss or gradient at which the run halts (`longread.train.divergence`); None: it
    goes on."""
    bad_batch: BadBatch = field(default="halt", metadata={"later": True})
    """At a batch whose loss or gradient is not finite the run halts, or goes on without it. The batch is kept
    (`longread.train.quarantine`)."""
    trained_blocks: int | None = field(default=None, metadata={"later": True})
    """Train only the last so many blocks and the final norm, and leave all else as it is; None: train everything."""

    recall: float = field(default=0.0, metadata={"later": True})
    """Share of the tokens of training sequences that are facts, and questions about them further on
    (`longread.data.recall`); at most 0.5, and as much as 256 facts are."""

    def _check(self) -> None:
        self._at_least(1, "context_length", "batch_size", "micro_batch_size", "steps", "truncate_after")
        self._at_least(1, "evaluate_every", "checkpoint_every", "max_bad_steps", "trained_blocks")
        self._at_least(1, "keep_checkpoints", "milestone_every")
        self._at_least(0, "seed", "recall")
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}; it must be below 2^63")
        if self.recall > MOST_RECALL:
            raise UserError(f"recall is {self.recall}; it must be at most {MOST_RECALL}, as a share of the tokens")
        M = self.model.mini_batch_size
        if self.context_length % M:
            lower = self.context_length // M * M
            near = f"{lower} or {lower + M}" if lower else f"{M}"
            raise UserError(
                f"context_length {self.context_length} is not a multiple of model.mini_batch_size {M}; use {near}"
            )
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if (self.trained_blocks or 0) > self.model.num_blocks:
            raise UserError(f"trained_blocks is {self.trained_blocks}; there are only {self.model.num_blocks} blocks")
        if self.loss == "end-to-end" and not self.model.num_suffix_blocks:
            raise UserError(
                "loss end-to-end needs fast weights: set model.num_suffix_blocks to 1 or more, or use loss static"
            )
        self.model.check_nothing_kept("training")
        if self.recompute != "auto":
            recomputation(self.recompute, self.model, self.loss, self.context_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism(Checked):
    """How several processes divide the work of a run. It decides nothing but how sums are rounded."""

    _path = "parallelism."

    update: Update = "shared"
    """shared: parameters whole on every rank, gradients and moments divided among the ranks of a machine; replicated:
    moments whole too; fully-sharded: parameters divided as well (FSDP2)."""
    state: int = 1
    """Ranks that read the same sequences and divide the hidden units of the fast MLPs among themselves."""

    def _check(self) -> None:
        self._at_least(1, "state")
        if self.state > 1 and self.update == "fully-sharded":
            raise UserError("parallelism.state above 1 does not go with update fully-sharded; use shared")
