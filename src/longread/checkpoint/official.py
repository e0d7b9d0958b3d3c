"""To and from the layout of the official implementation's numbers: stacked matrices, stored [in, out].

    weights.safetensors    embed.weight [V, D] · final_norm.weight [D] · lm_head.weight [D, V] (untied only)
                           blocks.* [L, ...] · prime.* [S, ...], the fast MLPs of the last S blocks
    config.json            the official names of the fields

Longread keeps one tensor per block and matrix, [out, in] as in torch.nn.Linear. Official w1, w3, w2 are our gate, up,
down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longread.checkpoint.model import CONFIG_FILE, build, fill
from longread.config import AttentionPattern, InnerConfig, ModelConfig, UserError
from longread.files import atomic_files, read_safetensors, write_safetensors
from longread.model import Transformer

OFFICIAL_WEIGHTS_FILE = "weights.safetensors"
WHOLE = {"embed.weight": "embedding.weight", "final_norm.weight": "final_norm.weight", "lm_head.weight": "head.weight"}
OF_A_BLOCK = {
    "wq": "attention.query",
    "wk": "attention.key",
    "wv": "attention.value",
    "wo": "attention.output",
    "q_norm": "attention.query_norm",
    "k_norm": "attention.key_norm",
    "seq_norm": "attention.pre_norm",
    "seq_post_norm": "attention.post_norm",
    "w1": "static_mlp.gate",
    "w3": "static_mlp.up",
    "w2": "static_mlp.down",
    "ffn_norm": "static_mlp.pre_norm",
    "ffn_post_norm": "static_mlp.post_norm",
}
OF_A_FAST_MLP = {
    "w1": "fast_mlp.gate",
    "w3": "fast_mlp.up",
    "w2": "fast_mlp.down",
    "ffn_prime_norm": "fast_mlp.pre_norm",
    "ffn_prime_post_norm": "fast_mlp.post_norm",
}
_STACKED = ("blocks.", "prime.")
_PATTERNS: dict[str, AttentionPattern] = {"SWA": "window", "SWAFull": "window", "self_attention": "full"}


class Place(NamedTuple):
    """Where one of our parameters lies among the official tensors."""

    name: str
    block: int | None
    """Its index in the stack `name`; None: it is the whole tensor."""
    turned: bool
    """Whether it is stored [in, out]."""
    stacked: int
    """Blocks that the stack has to have."""

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter, from the tensor called `name`, or from anything shaped like it."""
        part = tensor if self.block is None else tensor[self.block]
        return part.T.contiguous() if self.turned else part


def places(config: ModelConfig) -> dict[str, Place]:
    """Where each parameter lies, a tensor after the other; the head too, which a tied model has not.

    Gains that `config` switches off have no place.
    """
    found = {ours: Place(theirs, None, theirs == "lm_head.weight", 1) for theirs, ours in WHOLE.items()}
    for prefix, names, first in _stacks(config):
        for theirs, name in names.items():
            if _in_use(name, config):
                for block in range(first, config.num_blocks):
                    place = Place(f"{prefix}.{theirs}", block - first, "norm" not in name, config.num_blocks - first)
                    found[f"blocks.{block}.{name}.weight"] = place
    return found


def from_official(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Renames, unstacks and transposes parameters, or anything shaped like them (gradients), into our state dict.

    Gains that `config` switches off are dropped. Raises `UserError` if a stack has the wrong number of blocks.
    """
    ours = {}
    for name, place in places(config).items():
        if (tensor := tensors.get(place.name)) is not None:
            if place.block is not None and len(tensor) != place.stacked:
                raise UserError(f"{place.name} has {len(tensor)} blocks, but the config has {place.stacked}")
            ours[name] = place.of(tensor)
    return ours


def to_official(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`, for a whole state dict. Gains that `config` switches off are left out."""
    parts: dict[str, list[Tensor]] = {}
    for name, place in places(config).items():
        if name in state:
            parts.setdefault(place.name, []).append(state[name].T if place.turned else state[name])
    return {
        name: torch.stack(blocks) if name.startswith(_STACKED) else blocks[0].contiguous()
        for name, blocks in parts.items()
    }


def import_official(directory: str | Path) -> tuple[Transformer, InnerConfig]:
    """The model in `directory` (config.json, weights.safetensors) and the inner loop it was made for.

    Raises `UserError` with the reason when a file is missing or does not fit.
    """
    directory = Path(directory)
    try:
        fields = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        config, inner = model_config_from_official(fields), inner_config_from_official(fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / CONFIG_FILE} is no config of the official layout: {error}") from None
    model = build(config)
    tensors, _ = read_safetensors(directory / OFFICIAL_WEIGHTS_FILE)
    model.to(next(iter(tensors.values())).dtype if tensors else None)
    fill(model, from_official(tensors, config), where=directory / OFFICIAL_WEIGHTS_FILE)
    return model, inner


def export_official(directory: str | Path, model: Transformer, inner: InnerConfig) -> None:
    """Writes `model` in the official layout. Raises `UserError` for what that layout cannot name."""
    directory, config = Path(directory), model.config
    if config.mixer != "attention":
        raise UserError(f"mixer {config.mixer} has no name in the official layout; export a model of attention only")
    if config.attention == "hybrid":
        raise UserError("attention hybrid has no name in the official layout; export a window or full model")
    config.check_nothing_kept("the official layout")
    if inner.surprise:
        raise UserError(
            f"inner.surprise {inner.surprise:g} has no name in the official layout; export a model trained with 0"
        )
    fields = {
        "model": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": config.num_blocks,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.mlp_hidden,
            "mini_batch_size": config.mini_batch_size,
            "sliding_window_size": config.window_size,
            "suffix_len": config.num_suffix_blocks,
            "prime": config.num_suffix_blocks > 0,
            "rope_theta": config.rope_base,
            "rms_norm_eps": config.norm_eps,
            "qk_norm": config.qk_norm,
            "pre_norm": config.pre_norm,
            "post_norm": config.post_norm,
            "tie_word_embeddings": config.tie_embeddings,
            "output_size": config.vocab_size,
            "seq_modeling_block": "SWA" if config.attention == "window" else "self_attention",
        },
        "training": {
            "train_mode": "meta" if config.num_suffix_blocks else "pretrain",
            "ilr_init": inner.warmup_from,
            "ilr_warmup_steps": inner.warmup_steps,
            "optimizer_inner": {"optimizer_type": "sgd", "lr": inner.lr, "clip_gradient": inner.clip or 0.0},
        },
    }
    tensors = to_official(model.state_dict(), config)
    with atomic_files(directory / OFFICIAL_WEIGHTS_FILE, directory / CONFIG_FILE) as (weights, config_file):
        write_safetensors(weights, {name: t.cpu().contiguous() for name, t in tensors.items()})
        config_file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def model_config_from_official(fields: Mapping[str, Any]) -> ModelConfig:
    """The network that an official config describes. Raises `UserError` on a block type Longread does not have."""
    model = fields["model"]
    kind = model["seq_modeling_block"]
    if kind not in _PATTERNS:
        raise UserError(f"seq_modeling_block is {kind!r}; Longread has {', '.join(_PATTERNS)}")
    return ModelConfig(
        vocab_size=model["vocab_size"],
        width=model["hidden_size"],
        num_blocks=model["num_hidden_layers"],
        num_heads=model["num_attention_heads"],
        mlp_hidden=model["intermediate_size"],
        window_size=model["sliding_window_size"],
        mini_batch_size=model["mini_batch_size"],
        num_suffix_blocks=model["suffix_len"] if model["prime"] else 0,
        attention=_PATTERNS[kind],
        rope_base=model["rope_theta"],
        norm_eps=model["rms_norm_eps"],
        tie_embeddings=model["tie_word_embeddings"],
        pre_norm=model["pre_norm"],
        post_norm=model["post_norm"],
        qk_norm=model["qk_norm"],
    )


def inner_config_from_official(fields: Mapping[str, Any]) -> InnerConfig:
    """The inner loop of an official config; a clip of 0 there means none."""
    training, optimizer = fields["training"], fields["training"]["optimizer_inner"]
    return InnerConfig(
        lr=optimizer["lr"],
        clip=optimizer["clip_gradient"] or None,
        warmup_from=training["ilr_init"],
        warmup_steps=training["ilr_warmup_steps"],
    )


def _stacks(config: ModelConfig) -> list[tuple[str, dict[str, str], int]]:
    """Prefix, names and first block of each group of stacked tensors."""
    stacks = [("blocks", OF_A_BLOCK, 0)]
    if config.num_suffix_blocks:
        stacks.append(("prime", OF_A_FAST_MLP, config.num_prefix_blocks))
    return stacks


def _in_use(name: str, config: ModelConfig) -> bool:
    layer = name.rpartition(".")[2]
    switches = {"pre_norm": config.pre_norm, "post_norm": config.post_norm}
    return switches.get(layer, config.qk_norm if layer in ("query_norm", "key_norm") else True)
