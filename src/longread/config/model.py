"""The network: its sizes, and what a mixer adds to them."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from longread.config.checked import Checked, UserError
from longread.config.rope import RopeScaling

AttentionPattern = Literal["window", "full", "hybrid"]
Mixer = Literal["attention", "mamba2", "gated_deltanet", "ttt_kvb"]
BindingOutput = Literal["query", "key"]
Gate = Literal["silu", "gelu_tanh"]
BlockRope = Literal["global", "local", "none"]

KEPT_RULE = 3
"""Of choosing which tokens are kept beyond the window: part of what a session is bound to, since by another rule
surprise is on another scale (`longread.inner_loop.kept`)."""
HYBRID_PERIOD = 6  # hybrid attention: every sixth block sees everything (5 windowed : 1 full)


_LATER = {"later": True}  # left out of files where it has its default (`Checked.as_dict`)


class MixerPlan(NamedTuple):
    """The facts that a config needs about a mixer that was registered."""

    num_parameters: Callable[[ModelConfig], int]
    """Of one sub-layer, without the norms before and after it."""
    kept_numbers: tuple[int, int]
    """A token, for the gradient, as multiples of D: in the type of the products, and in float32."""


REGISTERED_MIXERS: dict[str, MixerPlan] = {}
"""`longread.register_mixer` adds to them."""

CONVOLUTION_WIDTH = 4  # tokens that the short convolution of a recurrent mixer sees, its own included


@dataclass(frozen=True, kw_only=True, slots=True)
class BindingConfig(Checked):
    """The inner loop of mixer "ttt_kvb" (paper Eq. 7 to 9): a step of each layer for itself, a mini-batch at a time."""

    _path = "model.binding."

    lr: float = 1.0
    """Rate of the step; the network scales it down to a rate of each token, between 0 and this."""
    clip: float | None = 1.0
    """Largest norm of the gradient of one layer and sequence; None: no clipping."""
    output: BindingOutput = "query"
    """The layer's output: its MLP's answer to a query (Eq. 8), or its prediction from the key (Eq. 9, simplified)."""

    def _check(self) -> None:
        self._at_least(0, "lr")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"{self._path}clip is {self.clip}; it must be positive, or none to switch clipping off")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Checked):
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

    # What the networks of pretrained models have beyond the paper's.
    kv_heads: int | None = field(default=None, metadata=_LATER)
    """Heads of keys and values, each shared by as many of the queries; None: one for each head."""
    head_size: int | None = field(default=None, metadata=_LATER)
    """H; None: D / N."""
    qkv_bias: bool = field(default=False, metadata=_LATER)
    gate: Gate = field(default="silu", metadata=_LATER)
    """The activation of the gate of every MLP."""
    fast_hidden: int | None = field(default=None, metadata=_LATER)
    """F of fast MLPs; None: that of the static ones."""
    fast_pre_norm: bool | None = field(default=None, metadata=_LATER)
    fast_post_norm: bool | None = field(default=None, metadata=_LATER)
    """Norms of the fast MLPs' sub-layers; None: as of the others."""
    embedding_scale: float = field(default=1.0, metadata=_LATER)
    rope_scaling: RopeScaling | None = field(default=None, metadata=_LATER)
    local_rope_base: float | None = field(default=None, metadata=_LATER)
    """Of blocks whose `block_rope` is "local"; never scaled."""
    block_rope: tuple[BlockRope, ...] | None = field(default=None, metadata=_LATER)
    """Of each block: "global" by `rope_base` and `rope_scaling`, "local", or "none"; None: all "global"."""
    block_windows: tuple[int, ...] | None = field(default=None, metadata=_LATER)
    """Most tokens that each block sees under any attention pattern, 0: no such limit; None: none has one."""
    attention_soft_cap: float | None = field(default=None, metadata=_LATER)
    logit_soft_cap: float | None = field(default=None, metadata=_LATER)
    """c: x becomes c tanh(x / c)."""

    # Beyond the paper: what attention sees that has left its window (`longread.inner_loop.kept`).
    kept_tokens: int = field(default=0, metadata=_LATER)
    """Keys and values that each attention keeps of tokens that have left the window, those that surprised most."""
    kept_run: int = field(default=48, metadata=_LATER)
    """A token counts as surprising as the most surprising run that it lies in, of so many tokens or a third as many."""
    kept_distance: int | None = field(default=None, metadata=_LATER)
    """How far before a mini-batch kept tokens seem to lie at most; None: a window."""

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
        self._check_pretrained()
        self._check_kept()
        if self.head_size is None and self.width % self.num_heads:
            raise UserError(
                f"model.width {self.width} does not divide into model.num_heads, {self.num_heads}; choose a multiple, "
                "or set model.head_size"
            )
        if self.head_dim % 2:
            name = "model.width / model.num_heads" if self.head_size is None else "model.head_size"
            raise UserError(f"{name} is {self.head_dim}; it must be even, as rotary embedding needs it")
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

    def _check_pretrained(self) -> None:
        self._at_least(1, "kv_heads", "head_size", "fast_hidden")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.kv_heads is {self.kv_heads}; it must divide model.num_heads, {self.num_heads}, so that each "
                "serves as many queries"
            )
        for name in ("block_rope", "block_windows"):
            given = getattr(self, name)
            if given is not None and len(given) != self.num_blocks:
                raise UserError(f"model.{name} has {len(given)} entries; give one for each of {self.num_blocks} blocks")
        if min(self.block_windows or (0,)) < 0:
            raise UserError(
                f"model.block_windows has {min(self.block_windows or ())}; give the tokens that a block sees, or 0"
            )
        if "local" in (self.block_rope or ()) and self.local_rope_base is None:
            raise UserError("model.block_rope names local blocks; set model.local_rope_base")
        if self.local_rope_base is not None and self.local_rope_base <= 1:
            raise UserError(f"model.local_rope_base is {self.local_rope_base}; it must be above 1")
        for name in ("embedding_scale", "attention_soft_cap", "logit_soft_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"model.{name} is {value}; it must be positive")
        if self.mixer in ("mamba2", "gated_deltanet", "ttt_kvb") and self.head_size is not None:
            raise UserError(f"model.mixer {self.mixer} takes no model.head_size; leave it out")

    def _check_kept(self) -> None:
        self._at_least(0, "kept_tokens")
        self._at_least(1, "kept_run")
        if not self.kept_tokens:
            return
        if (self.mixer, self.attention) != ("attention", "window") or self.block_windows or self.attention_soft_cap:
            raise UserError(
                f"model.kept_tokens is {self.kept_tokens}; it goes with windowed attention in every block alike, "
                "without model.block_windows and model.attention_soft_cap: set it to 0"
            )
        if self.window_size < self.mini_batch_size:
            raise UserError(
                f"model.kept_tokens is {self.kept_tokens}, and model.window_size {self.window_size} is less than "
                f"model.mini_batch_size {self.mini_batch_size}; choose a window of a mini-batch at least"
            )
        self._at_least(self.window_size, "kept_distance")

    def check_nothing_kept(self, where: str) -> None:
        """Raises `UserError` if the network keeps tokens, which `where` there are none of."""
        if self.kept_tokens:
            raise UserError(f"model.kept_tokens is {self.kept_tokens}; {where} knows no kept tokens, so set it to 0")

    @property
    def decodes_in_place(self) -> bool:
        """Whether a token can change the state of reading in place (`longread.inner_loop.places`)."""
        return self.mixer == "attention" and not self.kept_tokens

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads if self.head_size is None else self.head_size

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads if self.kv_heads is None else self.kv_heads

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys, and of its values: num_kv_heads · H."""
        return self.num_kv_heads * self.head_dim

    @property
    def fast_mlp_hidden(self) -> int:
        return self.mlp_hidden if self.fast_hidden is None else self.fast_hidden

    @property
    def fast_norms(self) -> tuple[bool, bool]:
        """Whether the fast MLPs' sub-layers have a norm before and after."""
        return (
            self.pre_norm if self.fast_pre_norm is None else self.fast_pre_norm,
            self.post_norm if self.fast_post_norm is None else self.fast_post_norm,
        )

    @property
    def num_prefix_blocks(self) -> int:
        return self.num_blocks - self.num_suffix_blocks

    def window_of(self, block: int) -> int | None:
        """Tokens that the attention of `block` sees, itself included; None: everything before it.

        Of a hybrid every sixth block sees everything, or the last of fewer. `block_windows` limits each.
        """
        period = min(HYBRID_PERIOD, self.num_blocks)
        full = self.attention == "full" or (self.attention == "hybrid" and block % period == period - 1)
        limit = self.block_windows[block] if self.block_windows else 0
        if full:
            return limit or None
        return min(limit, self.window_size) if limit else self.window_size

    def rope_of(self, block: int) -> BlockRope:
        """Which rotary embedding queries and keys of `block` have."""
        return self.block_rope[block] if self.block_rope else "global"

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
        D, L, S = self.width, self.num_blocks, self.num_suffix_blocks
        norms_per_layer = (self.pre_norm + self.post_norm) * D
        mixers = sum(self._mixer_parameters(kind) + norms_per_layer for i in range(L) for kind in self.mixers_of(i))
        static = L * (3 * D * self.mlp_hidden + norms_per_layer)
        fast = S * (3 * D * self.fast_mlp_hidden + sum(self.fast_norms) * D)
        embeddings = self.vocab_size * D * (1 if self.tie_embeddings else 2)
        return embeddings + mixers + static + fast + D

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
        queries = N * H
        biases = (queries + 2 * self.kv_width) * self.qkv_bias
        return 2 * D * queries + 2 * D * self.kv_width + biases + 2 * self.qk_norm * H

    @property
    def binding_hidden(self) -> int:
        """Hidden width of each head's MLP of "ttt_kvb": at 760M, 21M numbers in all (the paper's have 18M)."""
        return 2 * self.head_dim

    @property
    def num_fast_weights(self) -> int:
        """Numbers that one sequence adapts: three matrices in each suffix block."""
        return 3 * self.num_suffix_blocks * self.width * self.fast_mlp_hidden
