"""What a run is made of: frozen, typed, validated; no torch in here.

Every class checks its own fields when it is made, so a config that exists is a config that can run. Wrong
values raise `UserError` with the value, the limit and the remedy.

Letters used in the whole library: B sequences, T tokens of context, M tokens of a mini-batch (paper: b),
K window (paper: k), D width, F MLP hidden, N heads, H head dim, V vocabulary, L blocks, S suffix blocks.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self


class UserError(ValueError):
    """Something the user gave is wrong. The message is one sentence: the value, the limit, the remedy."""


AttentionPattern = Literal["window", "full", "hybrid"]
Mixer = Literal["attention", "mamba2", "gated_deltanet", "ttt_kvb"]
BindingOutput = Literal["query", "key"]
Loss = Literal["end-to-end", "static"]
MetaGradient = Literal["exact", "first-order"]
Recompute = Literal["auto", "none", "blocks", "sqrt", "step"]
Precision = Literal["auto", "float64", "float32", "bfloat16"]

HYBRID_PERIOD = 6  # hybrid attention: every sixth block sees everything (5 windowed : 1 full)
INNER_OPTIMIZERS = {"sgd"}
"""Names of the rules of the inner step; `longread.register_inner_optimizer` adds to them."""


class MixerPlan(NamedTuple):
    """What a config has to know about a mixer that was registered."""

    num_parameters: Callable[[ModelConfig], int]
    """Of one sub-layer, without the norms before and after it."""
    kept_numbers: tuple[int, int]
    """A token, for the gradient, as multiples of D: in the type of the products, and in float32."""


REGISTERED_MIXERS: dict[str, MixerPlan] = {}
"""`longread.register_mixer` adds to them."""

CONVOLUTION_WIDTH = 4  # tokens that the short convolution of a recurrent mixer sees, its own included


class _Checked:
    """Shared by every config: construction from plain data, with unknown or mistyped fields refused."""

    _path = ""  # of this config in a `RunConfig`, so that messages name a field as `--set` takes it

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config from what `dataclasses.asdict` gave. Raises `UserError` on unknown or wrong fields."""
        if not isinstance(values, dict):
            raise UserError(f"{cls.__name__} needs a table of fields, not {values!r}")
        types_ = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        made = {}
        for name, value in values.items():
            type_ = types_[name]
            if isinstance(type_, type) and issubclass(type_, _Checked) and not isinstance(value, type_):
                value = type_.from_dict(value)
            made[name] = value
        try:
            return cls(**made)
        except TypeError as error:
            raise UserError(f"{cls.__name__}: {error}") from None

    def as_dict(self) -> dict[str, Any]:
        """What `from_dict` takes. A field that is `later` than the format is left out while it has its default, so that
        files, and what is made of them, stay what they were."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if not f.metadata.get("later") or getattr(self, f.name) != f.default
        }
        return {name: value.as_dict() if isinstance(value, _Checked) else value for name, value in values.items()}

    def __post_init__(self) -> None:
        for name, type_ in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is_a(value, type_):
                raise UserError(f"{self._path}{name} is {value!r}; it must be {_describe(type_)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{self._path}{name} is {value}; it must be a finite number")
        self._check()

    def _check(self) -> None:
        """Overridden: relations between fields."""

    def _at_least(self, limit: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < limit:
                raise UserError(f"{self._path}{name} is {value}; it must be at least {limit}")


def _is_a(value: Any, type_: Any) -> bool:
    origin = typing.get_origin(type_)
    if origin is Literal:
        return value in typing.get_args(type_)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(type_))
    if type_ is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if type_ is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type_)


def _describe(type_: Any) -> str:
    if typing.get_origin(type_) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(type_)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    options = typing.get_args(type_) or (type_,)
    return " or ".join(names.get(option, getattr(option, "__name__", str(option))) for option in options)


@dataclass(frozen=True, kw_only=True, slots=True)
class BindingConfig(_Checked):
    """The inner loop of mixer "ttt_kvb" (paper Eq. 7 to 9): a step of each layer for itself, a mini-batch at a time."""

    _path = "model.binding."

    lr: float = 1.0
    """Rate of the step; the network scales it down to a rate of each token, between 0 and this."""
    clip: float | None = 1.0
    """Largest norm of the gradient of one layer and sequence; None: no clipping."""
    output: BindingOutput = "query"
    """What the layer gives: its MLP's answer to a query (Eq. 8), or its prediction from the key (Eq. 9, simplified)."""

    def _check(self) -> None:
        self._at_least(0, "lr")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"{self._path}clip is {self.clip}; it must be positive, or none to switch clipping off")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(_Checked):
    """The network of the paper (section 2): L sandwich-normed blocks, the last S of them with a fast MLP.

    `mixer` says how tokens exchange information. "attention" is the paper's own method and the first three of its
    baselines. The other baselines of its section 3.1 are hybrids with sliding-window attention:

    - "mamba2" and "gated_deltanet" alternate, recurrent block first: the paper says "a hybrid of" such "layers and SWA
      layers"; one to one is what Gated DeltaNet's authors do (arXiv 2412.06464, model H1).
    - "ttt_kvb" has windowed attention and after it, as a sub-layer of its own, a layer of key-value binding, in every
      block (section 2.4).
    """

    _path = "model."

    vocab_size: int
    width: int
    num_blocks: int
    num_heads: int
    mlp_hidden: int
    window_size: int
    mini_batch_size: int
    num_suffix_blocks: int = 0
    attention: AttentionPattern = "window"
    mixer: str = "attention"
    """One of `Mixer`, or a registered one, which alternates with windowed attention as "mamba2" does."""
    binding: BindingConfig = field(default_factory=BindingConfig)
    rope_base: float = 500_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    pre_norm: bool = True
    post_norm: bool = True
    qk_norm: bool = True
    init_std: float | None = None
    """Standard deviation of the initial matrices; None draws each at fan_in^-1/2 and the embedding at 0.02."""

    def _check(self) -> None:
        known = (*typing.get_args(Mixer), *REGISTERED_MIXERS)
        if self.mixer not in known:
            raise UserError(
                f"model.mixer is {self.mixer!r}; it must be one of {', '.join(known)}, or be registered with "
                "longread.register_mixer before it is named"
            )
        self._at_least(1, "vocab_size", "width", "num_blocks", "num_heads", "mlp_hidden", "window_size")
        self._at_least(1, "mini_batch_size")
        self._at_least(0, "num_suffix_blocks")
        if self.width % self.num_heads:
            raise UserError(
                f"model.width {self.width} does not divide into model.num_heads, {self.num_heads}; choose a multiple"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.width / model.num_heads is {self.head_dim}; it must be even, as rotary embedding needs it"
            )
        if self.num_suffix_blocks > self.num_blocks:
            raise UserError(
                f"model.num_suffix_blocks is {self.num_suffix_blocks}; there are only {self.num_blocks} blocks"
            )
        if self.rope_base <= 1:
            raise UserError(f"model.rope_base is {self.rope_base}; it must be above 1")
        if self.norm_eps <= 0:
            raise UserError(f"model.norm_eps is {self.norm_eps}; it must be positive")
        if self.init_std is not None and self.init_std <= 0:
            raise UserError(f"model.init_std is {self.init_std}; it must be positive")
        if self.mixer != "attention" and self.num_suffix_blocks:
            raise UserError(
                f"model.mixer {self.mixer} has no fast MLPs; set model.num_suffix_blocks to 0 instead of "
                f"{self.num_suffix_blocks}"
            )
        if self.mixer != "attention" and self.attention != "window":
            raise UserError(f"model.mixer {self.mixer} goes with model.attention window, not with {self.attention}")
        if self.mixer == "gated_deltanet" and self.width % (4 * self.num_delta_heads):
            raise UserError(
                f"model.width {self.width} is not a multiple of {4 * self.num_delta_heads}, as Gated DeltaNet needs"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_prefix_blocks(self) -> int:
        return self.num_blocks - self.num_suffix_blocks

    def window_of(self, block: int) -> int | None:
        """Tokens that the attention of `block` sees, itself included; None: everything before it.

        Of a hybrid every sixth block sees everything, or the last of fewer.
        """
        period = min(HYBRID_PERIOD, self.num_blocks)
        if self.attention == "full" or (self.attention == "hybrid" and block % period == period - 1):
            return None
        return self.window_size

    def mixers_of(self, block: int) -> tuple[str, ...]:
        """The sub-layers of `block` through which tokens exchange information, in their order."""
        if self.mixer == "attention":
            return ("attention",)
        if self.mixer == "ttt_kvb":
            return ("attention", "ttt_kvb")
        return (self.mixer,) if block % 2 == 0 else ("attention",)

    @property
    def num_ssd_heads(self) -> int:
        """Heads of Mamba 2, whose inner width is 2 D: as wide as those of attention."""
        return 2 * self.num_heads

    @property
    def ssd_state_size(self) -> int:
        """Width of the keys and queries (B and C) of Mamba 2: 128 as in its paper, less if heads are very narrow."""
        return min(128, 2 * self.head_dim)

    @property
    def num_delta_heads(self) -> int:
        """Heads of Gated DeltaNet: few and wide, as in its paper, with keys of at most 256 (the limit of a kernel)."""
        N, D = self.num_heads, self.width
        return next((n for n in range(1, N + 1) if N % n == 0 and 4 * n >= N and 1024 * n >= 3 * D), N)

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, norms and embeddings included."""
        D, F, L, S = self.width, self.mlp_hidden, self.num_blocks, self.num_suffix_blocks
        norms_per_layer = (self.pre_norm + self.post_norm) * D
        mixers = sum(self._mixer_parameters(kind) + norms_per_layer for i in range(L) for kind in self.mixers_of(i))
        mlp = 3 * D * F + norms_per_layer
        embeddings = self.vocab_size * D * (1 if self.tie_embeddings else 2)
        return embeddings + mixers + (L + S) * mlp + D

    def _mixer_parameters(self, kind: str) -> int:
        """Numbers of one sub-layer, without the norms before and after it."""
        if kind in REGISTERED_MIXERS:
            return REGISTERED_MIXERS[kind].num_parameters(self)
        D, N, H, C = self.width, self.num_heads, self.head_dim, CONVOLUTION_WIDTH
        if kind == "mamba2":
            heads, mixed = self.num_ssd_heads, 2 * D + 2 * self.ssd_state_size
            return D * (2 * D + mixed + heads) + C * mixed + 3 * heads + 2 * D + 2 * D * D
        if kind == "gated_deltanet":
            heads, keys, values = self.num_delta_heads, 3 * D // 4, 3 * D // 2
            mixed = 2 * keys + values
            return D * (mixed + values + 2 * heads) + C * mixed + 2 * heads + values // heads + values * D
        if kind == "ttt_kvb":
            projections = 2 + (self.binding.output == "query")
            return projections * D * D + D * N + (projections - 1) * self.qk_norm * H + 3 * D * self.binding_hidden
        return 4 * D * D + 2 * self.qk_norm * H

    @property
    def binding_hidden(self) -> int:
        """Hidden width of each head's MLP of "ttt_kvb": at 760M, 21M numbers in all (the paper's have 18M)."""
        return 2 * self.head_dim

    @property
    def num_fast_weights(self) -> int:
        """Numbers that one sequence adapts: three matrices in each suffix block."""
        return 3 * self.num_suffix_blocks * self.width * self.mlp_hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerConfig(_Checked):
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

    def _check(self) -> None:
        self._at_least(0, "lr", "warmup_from", "warmup_steps")
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
class OptimizerConfig(_Checked):
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
class RunConfig(_Checked):
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
    """What is computed again in the backward pass for want of memory (`longread.outer_loop`)."""
    precision: Precision = "auto"
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    max_bad_steps: int | None = 50
    """Steps in a row with an exploded loss or gradient at which the run halts (`longread.train.divergence`); None: it
    goes on."""

    def _check(self) -> None:
        self._at_least(1, "context_length", "batch_size", "micro_batch_size", "steps", "truncate_after")
        self._at_least(1, "evaluate_every", "checkpoint_every", "max_bad_steps")
        self._at_least(0, "seed")
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}; it must be below 2^63")
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
        if self.loss == "end-to-end" and not self.model.num_suffix_blocks:
            raise UserError(
                "loss end-to-end needs fast weights: set model.num_suffix_blocks to 1 or more, or use loss static"
            )
