"""A checkpoint as the official code saves it: the Orbax item `model_weights`, which comes without a config.

    language_model.model.               wte.weight [V, D] · ln_f.weight [D]
        h.blocks.                       {seq_norm, seq_post_norm, ffn_norm, ffn_post_norm}.weight [L, D]
        h.blocks.seq_modeling_block.    {wq, wk, wv, wo}.weight [L, D, D] · {q_norm, k_norm}.weight [L, H]
        h.blocks.feed_forward.          {w1, w3}.weight [L, D, F] · w2.weight [L, F, D]
        h.prime_storage.                feed_forward_prime.{w1, w2, w3}.weight · ffn_prime_{norm, post_norm}.weight
    language_model.                     lm_head.weight [D, V], of an untied model

Matrices are stored [in, out], those of `prime_storage` for the last S blocks. Shapes tell V, D, L, S, H, the hidden
widths and whether the head is tied; everything else is as in the paper's Table 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longread.checkpoint.official import OF_A_BLOCK, OF_A_FAST_MLP, places
from longread.checkpoint.orbax import OrbaxArrays
from longread.checkpoint.streamed import ParameterSpec
from longread.config import ModelConfig, UserError
from longread.model import undrawn
from longread.recipes import SIZES, pretrain

ITEM = "model_weights"
OFFICIAL_SIZES = {"1b": "1.3b"}
"""Sizes that have another name in the official code than in the paper."""
_PRIME = "h.prime_storage"
_ABOVE = ("language_model.", "model.")
_MLP, _PROJECTIONS, _HEAD_NORMS = ("w1", "w2", "w3"), ("wq", "wk", "wv", "wo"), ("q_norm", "k_norm")


class OrbaxModel(Mapping[str, Tensor]):
    """The parameters of an official checkpoint by our names, in an order in which each array is read once.

    Only the array that the last one came from is in memory.

    Args:
        directory: the item `model_weights`.
        size: a row of Table 3, or its name in the official code.
        window, mini_batch: None: as in Table 3.

    Raises:
        UserError: an array is missing, unknown, damaged or misshapen, or the size does not fit.
    """

    def __init__(
        self, directory: Path, size: str | None, *, window: int | None = None, mini_batch: int | None = None
    ) -> None:
        self._arrays = arrays = OrbaxArrays(directory)
        self._tree = _tree_names(arrays)
        shapes = self._shapes()
        row = _row(directory, shapes, size)
        self.table_config = row
        """Of Table 3, for what the size says and the shapes say otherwise."""
        self.config = dataclasses.replace(
            _with_shapes(row, shapes),
            window_size=window or row.window_size,
            mini_batch_size=mini_batch or row.mini_batch_size,
        )
        self._places = {name: place for name, place in places(self.config).items() if place.name in self._tree}
        self.dtype = functools.reduce(torch.promote_types, (leaf.dtype for leaf in arrays.leaves.values()))
        self.layout = self._checked_layout(shapes)
        self._held: tuple[str, Tensor] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        if self._held is None or self._held[0] != place.name:
            self._held = None  # before the next one is read
            self._held = place.name, self._arrays.read(self._tree[place.name])
        return place.of(self._held[1]).to(self.dtype)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each official tensor, with as many dimensions as it must have."""
        shapes = {name: self._arrays.leaves[found].shape for name, found in self._tree.items()}
        for name, shape in shapes.items():
            short = name.partition(".")[2]
            rank = 3 if short in (*_MLP, *_PROJECTIONS) else 1 if name == "final_norm.weight" else 2
            if len(shape) != rank:
                raise UserError(
                    f"{self._arrays.directory}: {self._tree[name]} has shape {shape}; it must have {rank} dimensions, "
                    "so give a checkpoint of the official network"
                )
        return shapes

    def _checked_layout(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ParameterSpec]:
        expected = {name: tuple(tensor.shape) for name, tensor in undrawn(self.config).state_dict().items()}
        for name, place in self._places.items():
            shape = expected[name][::-1] if place.turned else expected[name]
            if place.block is not None:
                shape = (place.stacked, *shape)
            if shapes[place.name] != shape:
                raise UserError(
                    f"{self._arrays.directory}: {self._tree[place.name]} has shape {shapes[place.name]}, and beside "
                    f"the other arrays it must have {shape}; give a checkpoint of the official network"
                )
        return {name: ParameterSpec(expected[name], self.dtype) for name in self._places}


def _tree_names(arrays: OrbaxArrays) -> dict[str, str]:
    """Which array each official tensor is. Raises `UserError` unless they are those of a TTT-E2E model."""
    known, found = _known_names(), {}
    for name in arrays.leaves:
        below = name
        for above in _ABOVE:
            below = below.removeprefix(above)
        if below in found or below not in known.values():
            raise UserError(
                f"{arrays.directory} holds {name}, which the official network has no place for; give its weights alone"
            )
        found[below] = name
    missing = [below for name, below in known.items() if below not in found and name != "lm_head.weight"]
    if missing and not any(below.startswith(_PRIME) for below in found) and missing[0].startswith(_PRIME):
        raise UserError(
            f"{arrays.directory} has no {_PRIME}: a baseline, of which nothing tells whether its attention is full nor "
            "its rotary base; give a checkpoint of TTT-E2E"
        )
    if missing:
        raise UserError(f"{arrays.directory} lacks the array {missing[0]}; copy it again, or give another checkpoint")
    return {name: found[below] for name, below in known.items() if below in found}


def _known_names() -> dict[str, str]:
    """The array of each official tensor, below `language_model.model.`."""
    names = {"embed.weight": "wte.weight", "final_norm.weight": "ln_f.weight", "lm_head.weight": "lm_head.weight"}
    for name in OF_A_BLOCK:
        folder = (
            "seq_modeling_block." if name in _PROJECTIONS + _HEAD_NORMS else "feed_forward." if name in _MLP else ""
        )
        names[f"blocks.{name}"] = f"h.blocks.{folder}{name}.weight"
    for name in OF_A_FAST_MLP:
        names[f"prime.{name}"] = f"{_PRIME}.{'feed_forward_prime.' if name in _MLP else ''}{name}.weight"
    return names


def _row(directory: Path, shapes: Mapping[str, tuple[int, ...]], size: str | None) -> ModelConfig:
    """The network of Table 3 that has this size. Raises `UserError` if it has other blocks than the arrays."""
    (L, D, _), H = shapes["blocks.wq"], shapes["blocks.q_norm"][1]
    names = {official: paper for official, paper in OFFICIAL_SIZES.items() if paper in SIZES}
    names |= {name: name for name in SIZES}
    found = (L, D, H)
    fits = [name for name, paper in names.items() if found == _blocks(paper)]
    remedy = f"give --size {fits[0]}" if fits else f"none of the sizes has them: {', '.join(names)}"
    theirs = f"{L} blocks of width {D} with heads of {H}"
    if size is None:
        raise UserError(f"{directory} comes without a config, so its size must be named: it has {theirs}; {remedy}")
    if size not in names:
        raise UserError(f"there is no size {size}; choose one of {', '.join(names)}")
    if names[size] not in [names[fit] for fit in fits]:
        blocks, width, heads = _blocks(names[size])
        raise UserError(
            f"{directory} has {theirs}, and {size} has {blocks} blocks of width {width} with heads of {heads}; {remedy}"
        )
    return pretrain(names[size], vocab_size=shapes["embed.weight"][0]).model


def _blocks(size: str) -> tuple[int, int, int]:
    row = SIZES[size]
    return row.num_blocks, row.width, row.width // row.num_heads


def _with_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """`config` with what only the shapes tell."""
    static, fast = shapes["blocks.w1"][2], shapes["prime.w1"][2]
    return dataclasses.replace(
        config,
        mlp_hidden=static,
        fast_hidden=None if fast == static else fast,
        num_suffix_blocks=shapes["prime.w1"][0],
        tie_embeddings="lm_head.weight" not in shapes,
    )
