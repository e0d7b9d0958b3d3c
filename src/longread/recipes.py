"""Runs as functions: the paper's Table 3, and two smaller ones. Two dials, size and context; the rest follows.

    toy                             0.8M parameters, for a laptop
    small                           7M parameters, for one GPU
    125m, 350m, 760m, 1.3b, 3b      the paper's
    a size other than toy, -extend  a trained model's extension to a longer context
    adapt, of a model that exists   a pretrained one becomes a reader

A method is a network, a loss, and the way it is read:

    e2e      windowed attention, the last quarter of the blocks learn, trained end to end (the paper's method)
    naive    the same network trained on the static loss: TTT-naive, or dynamic evaluation, when it reads learning
    swa      windowed attention and no fast weights
    full     full attention
    hybrid   five windowed blocks, then one full
    mamba2   Mamba 2 and windowed attention in turn
    gdn      Gated DeltaNet and windowed attention in turn
    kvb      windowed attention and a layer of key-value binding in every block: TTT-KVB

All have equal parameter count: where something is added, every MLP is narrowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from longread.config import AttentionPattern, InnerConfig, Mixer, ModelConfig, OptimizerConfig, RunConfig, UserError

Method = Literal["e2e", "naive", "swa", "full", "hybrid", "mamba2", "gdn", "kvb"]

LLAMA3_VOCABULARY = 128_256
BYTE_VOCABULARY = 257
PRETRAINING_CONTEXT = 8192
_FULL_ATTENTION_ROPE = {8192: 5e5, 16384: 1e6, 32768: 2e6, 65536: 5e6, 131072: 1e7}
_ATTENTION: dict[str, AttentionPattern] = {"full": "full", "hybrid": "hybrid"}
_MIXER: dict[str, Mixer] = {"mamba2": "mamba2", "gdn": "gated_deltanet", "kvb": "ttt_kvb"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """One row of Table 3. Batches and token counts are in tokens."""

    num_blocks: int
    width: int
    num_heads: int
    mlp_hidden: int
    """Before it is narrowed to make room for the fast MLPs."""
    batch_tokens: int
    lr: float
    steps: int
    extension_batch_tokens: int
    extension_steps: int


SIZES = {
    "125m": Size(
        num_blocks=12,
        width=768,
        num_heads=12,
        mlp_hidden=2048,
        batch_tokens=2**19,
        lr=3e-3,
        steps=4800,
        extension_batch_tokens=2**20,
        extension_steps=120,
    ),
    "350m": Size(
        num_blocks=24,
        width=1024,
        num_heads=16,
        mlp_hidden=2816,
        batch_tokens=2**19,
        lr=1.5e-3,
        steps=13_500,
        extension_batch_tokens=2**20,
        extension_steps=337,
    ),
    "760m": Size(
        num_blocks=24,
        width=1536,
        num_heads=16,
        mlp_hidden=4096,
        batch_tokens=2**19,
        lr=1.25e-3,
        steps=29_000,
        extension_batch_tokens=2**20,
        extension_steps=725,
    ),
    "1.3b": Size(
        num_blocks=24,
        width=2048,
        num_heads=32,
        mlp_hidden=5376,
        batch_tokens=2**19,
        lr=1e-3,
        steps=50_000,
        extension_batch_tokens=2**20,
        extension_steps=1250,
    ),
    "3b": Size(
        num_blocks=32,
        width=2560,
        num_heads=32,
        mlp_hidden=6912,
        batch_tokens=2**20,
        lr=8e-4,
        steps=52_000,
        extension_batch_tokens=2**21,
        extension_steps=1300,
    ),
}


def narrowed(mlp_hidden: int, num_blocks: int, num_suffix_blocks: int) -> int:
    """F such that L + S MLPs hold what L of `mlp_hidden` did: roundup128(F · L / (L + S))."""
    return math.ceil(mlp_hidden * num_blocks / (num_blocks + num_suffix_blocks) / 128) * 128


def with_mixer(config: ModelConfig, mixer: Mixer, *, multiple: int = 128) -> ModelConfig:
    """`config` with another mixer, and MLPs narrowed, to a multiple, so that the parameter count stays.

    Raises `UserError` if the mixer alone has more parameters than there may be.
    """
    mixed = dataclasses.replace(config, mixer=mixer)
    per_hidden = 3 * config.width * (config.num_blocks + config.num_suffix_blocks)
    excess = (mixed.num_parameters - config.num_parameters) / per_hidden
    hidden = round((config.mlp_hidden - excess) / multiple) * multiple
    if hidden < multiple:
        raise UserError(
            f"mixer {mixer} needs as many parameters as MLPs of {math.ceil(excess)} hidden units have, but "
            f"model.mlp_hidden is {config.mlp_hidden}; make it larger"
        )
    return dataclasses.replace(mixed, mlp_hidden=hidden)


def pretrain(size: str, method: Method = "e2e", *, vocab_size: int = LLAMA3_VOCABULARY, seed: int = 0) -> RunConfig:
    """Table 3, pre-training at 8K: 10 % warm-up, cosine to 1e-5, the inner rate warmed from 0.1 to 1 meanwhile."""
    row = _row(size)
    warmup = round(0.1 * row.steps)
    return RunConfig(
        name=f"{size}-{method}",
        model=_paper_model(row, method, PRETRAINING_CONTEXT, vocab_size),
        loss=_loss(method),
        inner=InnerConfig(warmup_steps=warmup),
        optimizer=OptimizerConfig(lr=row.lr, warmup_steps=warmup, decay_steps=row.steps),
        context_length=PRETRAINING_CONTEXT,
        batch_size=row.batch_tokens // PRETRAINING_CONTEXT,
        steps=row.steps,
        seed=seed,
    )


def extend(
    size: str,
    method: Method = "e2e",
    *,
    context_length: int = 131_072,
    vocab_size: int = LLAMA3_VOCABULARY,
    seed: int = 0,
) -> RunConfig:
    """Table 3, extension of a pre-trained model to a longer context: 5 % of the tokens, twice the batch, lr 4e-4."""
    row = _row(size)
    if row.extension_batch_tokens % context_length:
        raise UserError(
            f"context_length {context_length} does not divide the batch of {row.extension_batch_tokens} tokens; "
            f"use a power of two up to {row.extension_batch_tokens}"
        )
    return RunConfig(
        name=f"{size}-{method}-{context_length}",
        model=_paper_model(row, method, context_length, vocab_size),
        loss=_loss(method),
        optimizer=OptimizerConfig(
            lr=4e-4, warmup_steps=round(0.1 * row.extension_steps), decay_steps=row.extension_steps
        ),
        context_length=context_length,
        batch_size=row.extension_batch_tokens // context_length,
        steps=row.extension_steps,
        seed=seed,
    )


def toy(
    method: Method = "e2e",
    *,
    context_length: int = 1024,
    vocab_size: int = BYTE_VOCABULARY,
    steps: int = 250,
    seed: int = 0,
) -> RunConfig:
    """0.8M parameters on bytes, minutes on two CPU cores: window : mini-batch : context as 128 : 32 : 1024."""
    warmup = round(0.1 * steps)
    L, S = 4, _suffix(4, method)
    model = ModelConfig(
        vocab_size=vocab_size,
        width=128,
        num_blocks=L,
        num_heads=4,
        mlp_hidden=narrowed(320, L, S) if S else 320,
        window_size=128,
        mini_batch_size=32,
        num_suffix_blocks=S,
        attention=_ATTENTION.get(method, "window"),
    )
    return RunConfig(
        name=f"toy-{method}",
        model=_mixed(model, method, multiple=8),
        loss=_loss(method),
        inner=InnerConfig(warmup_steps=warmup),
        optimizer=_optimizer(3e-3, warmup, steps),
        context_length=context_length,
        batch_size=8,
        steps=steps,
        seed=seed,
    )


def small(
    method: Method = "e2e",
    *,
    context_length: int = 1024,
    vocab_size: int = 4096,
    steps: int = 1000,
    seed: int = 0,
) -> RunConfig:
    """7M parameters, a minute or two on a GPU: window : mini-batch as 1024 : 128, an eighth of the paper's, 64K tokens
    a step."""
    warmup = round(0.1 * steps)
    return RunConfig(
        name=f"small-{method}",
        model=_small_model(method, context_length, vocab_size),
        loss=_loss(method),
        inner=InnerConfig(warmup_steps=warmup),
        optimizer=_optimizer(3e-3, warmup, steps),
        context_length=context_length,
        batch_size=max(1, 2**16 // context_length),
        steps=steps,
        seed=seed,
    )


def small_extend(
    method: Method = "e2e",
    *,
    context_length: int = 16_384,
    vocab_size: int = 4096,
    steps: int = 200,
    seed: int = 0,
) -> RunConfig:
    """Extension of a small model to a longer context: 40 % of the tokens, twice the batch, a third of the rate.

    16K is to this size what 128K is to the paper's. With 10 % full attention does not recover from its new
    rotary base.
    """
    return RunConfig(
        name=f"small-{method}-{context_length}",
        model=_small_model(method, context_length, vocab_size),
        loss=_loss(method),
        optimizer=_optimizer(1e-3, round(0.1 * steps), steps),
        context_length=context_length,
        batch_size=max(1, 2**17 // context_length),
        steps=steps,
        seed=seed,
    )


def adapt(
    model: ModelConfig,
    method: Method = "e2e",
    *,
    inner: InnerConfig | None = None,
    context_length: int = 8192,
    batch_size: int = 8,
    steps: int = 200,
    lr: float = 3e-4,
    seed: int = 0,
) -> RunConfig:
    """Further training of a model that exists, 13M tokens of it, so that a pretrained one learns to learn.

    Of one model "swa" and "full" are the twins without fast MLPs, with its windows and without them. Only limits of
    single blocks stay, as pretraining had them. The inner rate climbs to that of `inner`, by default 1. The
    meta-gradient is first-order: in the time of the exact one it sees more tokens, and was ahead with them
    (docs/pretrained.md).

    Raises `UserError` if the method needs what the model has not.
    """
    if model.mixer != "attention":
        raise UserError(f"a model with model.mixer {model.mixer} cannot be adapted; begin with one of attention alone")
    if method not in ("e2e", "naive", "swa", "full", "hybrid"):
        raise UserError(f"a model that exists cannot become {method}; choose e2e, naive, swa, full or hybrid")
    if method in ("e2e", "naive") and not model.num_suffix_blocks:
        raise UserError(
            f"method {method} needs fast MLPs and this model has none; convert it with some (--suffix), or choose swa "
            "or full"
        )
    if method not in ("e2e", "naive"):
        model = dataclasses.replace(without_fast_weights(model), attention=_ATTENTION.get(method, "window"))
    warmup, inner = round(0.1 * steps), inner or InnerConfig()
    return RunConfig(
        name=f"adapt-{method}",
        model=model,
        loss=_loss(method),
        meta_gradient="first-order" if method == "e2e" else "exact",
        inner=dataclasses.replace(inner, warmup_from=0.1 * inner.lr, warmup_steps=warmup),
        optimizer=_optimizer(lr, warmup, steps),
        context_length=context_length,
        batch_size=batch_size,
        steps=steps,
        seed=seed,
    )


def without_fast_weights(model: ModelConfig) -> ModelConfig:
    """The same network without its fast MLPs."""
    return dataclasses.replace(model, num_suffix_blocks=0, fast_hidden=None, fast_pre_norm=None, fast_post_norm=None)


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """`config` over another number of steps, and its schedules with it: warm-ups and decay keep their share of them."""

    def scaled(count: int) -> int:
        return round(count * steps / config.steps)

    if steps == config.steps:
        return config
    optimizer, inner = config.optimizer, config.inner
    warmup = scaled(optimizer.warmup_steps)
    return dataclasses.replace(
        config,
        steps=steps,
        optimizer=dataclasses.replace(
            optimizer,
            initial_lr=optimizer.initial_lr * optimizer.warmup_steps / max(1, warmup),
            warmup_steps=warmup,
            decay_steps=max(1, scaled(optimizer.decay_steps)),
        ),
        inner=dataclasses.replace(inner, warmup_steps=scaled(inner.warmup_steps)),
    )


def with_lr(config: RunConfig, lr: float) -> RunConfig:
    """`config` with another outer rate, from which its warm-up begins as far away as before."""
    initial = config.optimizer.initial_lr * lr / config.optimizer.lr
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=lr, initial_lr=initial))


def recipe(
    name: str,
    method: Method = "e2e",
    *,
    context_length: int | None = None,
    vocab_size: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> RunConfig:
    """A run by name: "toy", a size ("small", "125m" … "3b"), or a size and "-extend". Raises `UserError` for any other.

    `None` leaves a dial to the recipe. Other `steps` scale the schedules (`with_steps`).
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    if method not in get_args(Method):
        raise UserError(f"there is no method {method!r}; choose one of {', '.join(get_args(Method))}")
    dials = {"context_length": context_length, "vocab_size": vocab_size}
    if name in SIZES:
        if context_length not in (None, PRETRAINING_CONTEXT):
            raise UserError(f"pre-training is at {PRETRAINING_CONTEXT} tokens; for {context_length} use {name}-extend")
        del dials["context_length"]
    config = RECIPES[name](method, seed=seed, **{dial: value for dial, value in dials.items() if value is not None})
    if steps is not None:
        config = with_steps(config, steps)
    if lr is not None:
        config = with_lr(config, lr)
    return config if batch_size is None else dataclasses.replace(config, batch_size=batch_size)


def _of(make: Callable[..., RunConfig], size: str) -> Callable[..., RunConfig]:
    return lambda method="e2e", **dials: make(size, method, **dials)


RECIPES: dict[str, Callable[..., RunConfig]] = {
    "toy": toy,
    "small": small,
    "small-extend": small_extend,
    **{size: _of(pretrain, size) for size in SIZES},
    **{f"{size}-extend": _of(extend, size) for size in SIZES},
}


def _row(size: str) -> Size:
    if size not in SIZES:
        raise UserError(f"there is no size {size!r}; choose one of {', '.join(SIZES)}")
    return SIZES[size]


def _optimizer(lr: float, warmup_steps: int, steps: int) -> OptimizerConfig:
    """AdamW of our own sizes. The first update has a rate, unlike in the paper's schedule: a step of a short run."""
    initial = lr / max(1, warmup_steps)
    return OptimizerConfig(lr=lr, initial_lr=initial, warmup_steps=warmup_steps, decay_steps=steps)


def _suffix(num_blocks: int, method: Method) -> int:
    return num_blocks // 4 if method in ("e2e", "naive") else 0


def _loss(method: Method) -> Literal["end-to-end", "static"]:
    return "end-to-end" if method == "e2e" else "static"


def _mixed(model: ModelConfig, method: Method, *, multiple: int = 128) -> ModelConfig:
    return with_mixer(model, _MIXER[method], multiple=multiple) if method in _MIXER else model


def _paper_model(row: Size, method: Method, context_length: int, vocab_size: int) -> ModelConfig:
    S = _suffix(row.num_blocks, method)
    rope_base = 5e5
    if method == "full":
        if context_length not in _FULL_ATTENTION_ROPE:
            known = ", ".join(map(str, _FULL_ATTENTION_ROPE))
            raise UserError(f"full attention has a rotary base for {known} tokens, not for {context_length}")
        rope_base = _FULL_ATTENTION_ROPE[context_length]
    model = ModelConfig(
        vocab_size=vocab_size,
        width=row.width,
        num_blocks=row.num_blocks,
        num_heads=row.num_heads,
        mlp_hidden=narrowed(row.mlp_hidden, row.num_blocks, S) if S else row.mlp_hidden,
        window_size=8192,
        mini_batch_size=1024,
        num_suffix_blocks=S,
        attention=_ATTENTION.get(method, "window"),
        rope_base=rope_base,
        init_std=0.02,
    )
    return _mixed(model, method)


def _small_model(method: Method, context_length: int, vocab_size: int) -> ModelConfig:
    L, S = 8, _suffix(8, method)
    rope_base = 5e5
    if method == "full":  # the paper's bases at an eighth of its lengths; beyond them the last one grows on
        longer = [base for length, base in _FULL_ATTENTION_ROPE.items() if length >= 8 * context_length]
        rope_base = longer[0] if longer else 1e7 * context_length / 16_384
    model = ModelConfig(
        vocab_size=vocab_size,
        width=256,
        num_blocks=L,
        num_heads=4,
        mlp_hidden=narrowed(640, L, S) if S else 640,
        window_size=1024,
        mini_batch_size=128,
        num_suffix_blocks=S,
        attention=_ATTENTION.get(method, "window"),
        rope_base=rope_base,
    )
    return _mixed(model, method, multiple=16)
