"""The weights of a GGUF file, dequantised tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longread.config import UserError
from longread.extras import install_command
from longread.pretrained.source import Stored, TensorSource

_PARTS = {
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "attention.pre_norm": "attn_norm",
    "attention.post_norm": "post_attention_norm",
    "static_mlp.gate": "ffn_gate",
    "static_mlp.up": "ffn_up",
    "static_mlp.down": "ffn_down",
    "static_mlp.pre_norm": "ffn_norm",
    "static_mlp.post_norm": "post_ffw_norm",
}
_WHOLE = {
    "embedding.weight": "token_embd.weight",
    "final_norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROTARY_FACTORS = "rope_freqs.weight"


class GGUFSource(TensorSource):
    """A GGUF file. Its tensors stay on the disk until they are asked for.

    Raises:
        UserError: the `gguf` package is missing, or the file is no GGUF, truncated, or one of several.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            from gguf import GGUFReader, dequantize
        except ImportError:
            raise UserError(f"reading {path} needs the package gguf; {install_command('gguf')} installs it") from None
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path} is no whole GGUF file: {reason}; fetch it again") from None
        self._dequantize: Any = dequantize
        self._found: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        """The metadata of the model and of its tokenizer."""
        count = self.metadata.get("split.count", 1)
        if count > 1:
            raise UserError(f"{path} is one of {count} parts; join them first with `llama-gguf-split --merge`")
        self.tensors = {name: _stored(tensor) for name, tensor in self._found.items()}

    @property
    def quantisation(self) -> str | None:
        """The kinds of quantised tensors, the one with most numbers first; None if there are none."""
        sizes: dict[str, int] = {}
        for tensor in self._found.values():
            if tensor.tensor_type.name not in _PLAIN:
                sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
        return ", ".join(sorted(sizes, key=lambda name: -sizes[name])) or None

    def read(self, name: str) -> Tensor:
        tensor, stored = self._found[name], self.tensors[name]
        try:
            numbers = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{name} in {self.where} is quantised as {tensor.tensor_type.name}, which the package gguf cannot "
                "dequantise; give another quantisation"
            ) from None
        found = torch.from_numpy(np.array(numbers)).reshape(stored.shape)  # a copy: the file is mapped
        return found.to(stored.dtype)

    def name_of(self, part: str, *, post_norm: bool) -> str:
        if part in _WHOLE:
            return _WHOLE[part]
        _, block, rest = part.split(".", 2)
        name, _, kind = rest.rpartition(".")
        return f"blk.{block}.{_PARTS[name]}.{kind}"

    def is_ignored(self, name: str) -> bool:
        return name == ROTARY_FACTORS


def _stored(tensor: Any) -> Stored:
    kind = tensor.tensor_type.name
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return Stored(shape, _PLAIN.get(kind, torch.float32), None if kind in _PLAIN else kind)
