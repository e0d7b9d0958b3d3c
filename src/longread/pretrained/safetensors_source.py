"""The weights of a Transformers directory: model.safetensors, or shards that an index lists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longread.config import UserError
from longread.pretrained.source import Stored, TensorSource

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PARTS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.pre_norm": "input_layernorm",
    "static_mlp.gate": "mlp.gate_proj",
    "static_mlp.up": "mlp.up_proj",
    "static_mlp.down": "mlp.down_proj",
}
_NORMS = {
    False: {"static_mlp.pre_norm": "post_attention_layernorm"},
    True: {
        "attention.post_norm": "post_attention_layernorm",
        "static_mlp.pre_norm": "pre_feedforward_layernorm",
        "static_mlp.post_norm": "post_feedforward_layernorm",
    },
}
_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
"""Before the names of a text model: by itself, inside one that sees too (newer and older), and saved without a head."""
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.")


def parts_of(*, post_norm: bool) -> dict[str, str]:
    """Our names of what a block holds, with those of Transformers.

    Args:
        post_norm: the architecture has norms behind its sub-layers.
    """
    return _PARTS | _NORMS[post_norm]


class SafetensorsSource(TensorSource):
    """A directory as `save_pretrained` writes it. Only headers are read before a tensor is asked for.

    Raises:
        UserError: there are no safetensors files, one that the index names is missing, or one is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        self._file_of: dict[str, Path] = {}
        self.tensors: dict[str, Stored] = {}
        for path in _files(directory):
            self._add(path)
        head = next((name for name in self.tensors if name.endswith("embed_tokens.weight")), "")
        prefix = head.removesuffix("embed_tokens.weight")
        if not head or prefix not in _PREFIXES:
            raise UserError(f"{directory} holds no embed_tokens.weight of a text model; give another directory")
        self._prefix = prefix

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    kind = part.get_dtype()
                    dtype = _DTYPES.get(kind, torch.float32)
                    self.tensors[name] = Stored(tuple(part.get_shape()), dtype, None if kind in _DTYPES else kind)
                    self._file_of[name] = path
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {_reason(error)}; fetch it again") from None

    def read(self, name: str) -> Tensor:
        path, stored = self._file_of[name], self.tensors[name]
        if stored.quantised:
            raise UserError(f"{name} in {path} is stored as {stored.quantised}, which is not read; give other weights")
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name).clone()  # else a view of the mapped file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {_reason(error)}; fetch it again") from None

    def name_of(self, part: str, *, post_norm: bool) -> str:
        if part == "head.weight":
            return "lm_head.weight" if "lm_head.weight" in self.tensors else self._head()
        if part == "embedding.weight":
            return f"{self._prefix}embed_tokens.weight"
        if part == "final_norm.weight":
            return f"{self._prefix}norm.weight"
        _, block, rest = part.split(".", 2)
        name, _, kind = rest.rpartition(".")
        return f"{self._prefix}layers.{block}.{parts_of(post_norm=post_norm)[name]}.{kind}"

    def _head(self) -> str:
        """Where models that see too keep the head; the common name if it is nowhere."""
        return next((name for name in self.tensors if name.endswith(".lm_head.weight")), "lm_head.weight")

    def is_ignored(self, name: str) -> bool:
        return bool(_IGNORED.search(name))


def has_weights(directory: Path) -> bool:
    """Whether the directory holds safetensors as Transformers names them."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        single = directory / SINGLE
        if single.is_file():
            return [single]
        pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pth")) + sorted(directory.glob("*.pt"))
        if pickled:
            raise UserError(
                f"{directory} holds its weights as pickles ({pickled[0].name}), which can run code and are never "
                "loaded; save them as safetensors first"
            )
        raise UserError(f"{directory} holds no {SINGLE} and no {INDEX}; give a directory with safetensors weights")
    try:
        weight_map: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of shards; fetch it again") from None
    for name in names:
        if not (directory / str(name)).is_file():
            raise UserError(f"{directory} lacks {name}, one of {len(names)} shards that {INDEX} names; fetch it too")
    return [directory / name for name in names]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
