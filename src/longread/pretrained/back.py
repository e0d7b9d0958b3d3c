"""A reader becomes a plain windowed model for Transformers.

A fast MLP that adds nothing is left out, and one before a static MLP that adds nothing takes its place. Any other makes
a block of two MLPs, one after the other, which no architecture of Transformers has, and which is not one wider MLP
either: it is left out only if the user says so.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from longread.checkpoint import LoadedModel, ParameterSpec, load_model, stream_safetensors
from longread.config import UserError
from longread.model import Transformer
from longread.pretrained.back_config import Plain, plain_of
from longread.pretrained.safetensors_source import SINGLE, parts_of
from longread.pretrained.tokenizer import COPIED, copy_settings, special_ids
from longread.pretrained.weights import half_split

CONFIG_FILE = "config.json"


def export_transformers(source: Path, directory: Path, *, drop_fast: bool = False) -> str:
    """Writes config.json, model.safetensors and the tokenizer's files into `directory`, and says what they are.

    Args:
        source: a reader: a model directory, a run or a checkpoint.
        drop_fast: leave out fast MLPs that cannot be expressed, with what their initial weights add.

    Raises:
        UserError: there is no reader, or no architecture of Transformers can be it.
    """
    loaded = load_model(source)
    config = loaded.model.config
    plain = plain_of(config, loaded.metadata.get("provenance", {}))
    in_place, dropped = _fates(loaded.model)
    if dropped and not drop_fast:
        raise UserError(
            f"{len(dropped)} fast MLPs of {source} have learned something that no Transformers model has a place for "
            "(two MLPs in sequence are not one); give --drop-fast to leave them out, which changes the model"
        )
    weights = _PlainWeights(loaded.model, plain, in_place)
    stream_safetensors(directory / SINGLE, weights.layout, weights, {"format": "pt"})
    tokenizer = _copy_tokenizer(loaded, directory)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    values = plain.values | special_ids(directory) | {"dtype": dtype, "torch_dtype": dtype}
    (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    left = f"without {len(dropped)} fast MLPs, " if dropped else ""
    return f"a {plain.values['model_type']} model for Transformers, {left}{plain.note}{tokenizer}"


def _copy_tokenizer(loaded: LoadedModel, directory: Path) -> str:
    path = loaded.tokenizer_path
    if path is None:
        return "without a tokenizer: there is none beside the model"
    for name in (path.name, *COPIED):
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, directory / name)
    copy_settings(path.parent, directory)
    return "with its tokenizer"


def _fates(model: Transformer) -> tuple[set[int], list[int]]:
    """Blocks whose fast MLP is the only one that does something, and those where both do."""
    in_place, both = set(), []
    for block in range(model.config.num_prefix_blocks, model.config.num_blocks):
        fast, static = (_adds(model, f"blocks.{block}.{kind}") for kind in ("fast_mlp", "static_mlp"))
        norms = model.config.fast_norms == (model.config.pre_norm, model.config.post_norm)
        if fast and not static and norms and model.config.fast_mlp_hidden <= model.config.mlp_hidden:
            in_place.add(block)
        elif fast:
            both.append(block)
    return in_place, both


def _adds(model: Transformer, mlp: str) -> bool:
    module = model.get_submodule(mlp)
    ends = [p for name, p in module.named_parameters() if name in ("down.weight", "post_norm.weight")]
    return all(bool(tensor.any()) for tensor in ends)


class _PlainWeights(Mapping[str, Tensor]):
    """The parameters of the plain model, by the names that Transformers has for them, each made when asked for."""

    def __init__(self, model: Transformer, plain: Plain, in_place: set[int]) -> None:
        self._state, self._config, self._plain, self._in_place = model.state_dict(), model.config, plain, in_place
        dtype = model.embedding.weight.dtype
        self._makers = dict(self._named())
        self.layout = {name: ParameterSpec(shape, dtype) for name, (shape, _) in self._makers.items()}
        self._dtype = dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name][1]().to(self._dtype).contiguous()

    def _named(self) -> Iterator[tuple[str, tuple[tuple[int, ...], Callable[[], Tensor]]]]:
        config, parts = self._config, parts_of(post_norm=self._config.post_norm)
        yield "model.embed_tokens.weight", self._of("embedding.weight", self._plain.embedding_factor)
        yield "model.norm.weight", self._of("final_norm.weight", self._plain.final_factor)
        if not config.tie_embeddings:
            yield "lm_head.weight", self._of("head.weight")
        for i in range(config.num_blocks):
            for ours, theirs in parts.items():
                for kind in ("weight", "bias"):
                    name = f"blocks.{i}.{ours}.{kind}"
                    if name in self._state:
                        found = name.replace("static_mlp", "fast_mlp") if i in self._in_place else name
                        yield f"model.layers.{i}.{theirs}.{kind}", self._of(found)
            if self._plain.values["attention_bias"]:  # the architecture has one there too
                shape = (config.width,)
                yield f"model.layers.{i}.self_attn.o_proj.bias", (shape, functools.partial(torch.zeros, shape))

    def _of(self, name: str, factor: float = 1.0) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
        shape = tuple(self._state[name].shape)
        if ".fast_mlp." in name:
            shape = tuple(self._state[name.replace("fast_mlp", "static_mlp")].shape)
        return shape, lambda: self._made(name, shape, factor)

    def _made(self, name: str, shape: tuple[int, ...], factor: float) -> Tensor:
        tensor = self._state[name]
        part = name.rpartition(".")[0]
        if part.endswith(("attention.query", "attention.key", "attention.query_norm", "attention.key_norm")):
            tensor = half_split(tensor, self._config.head_dim)
        if factor != 1:
            tensor = tensor * factor
        if part.endswith("norm") and self._plain.gain_offset:
            tensor = (tensor.float() if tensor.dtype.itemsize < 4 else tensor) - self._plain.gain_offset
        for dim, size in enumerate(shape):  # a narrower fast MLP: units of 0
            if tensor.shape[dim] < size:
                tensor = functional.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, size - tensor.shape[dim]])
        return tensor
