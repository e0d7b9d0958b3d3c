"""A model directory written parameter by parameter: only one is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from longread.checkpoint.model import CONFIG_FILE, KIND, WEIGHTS_FILE, described
from longread.config import InnerConfig, ModelConfig
from longread.files import FORMAT, FORMAT_VERSION, atomic_files, digest, write_json
from longread.model.fingerprint import fingerprint_of_parts

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
"""As safetensors calls them."""
_NO_DIGEST = "0" * 64


class ParameterSpec(NamedTuple):
    """A parameter before it is made."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save_streamed(
    directory: str | Path,
    config: ModelConfig,
    layout: Mapping[str, ParameterSpec],
    parameters: Mapping[str, Tensor],
    inner: InnerConfig,
    tokenizer_fingerprint: str | None,
    extra: Mapping[str, Any] | None = None,
    *,
    learns: bool = True,
) -> str:
    """Writes or replaces the files that `save_model` writes of a model with these parameters, and returns its
    fingerprint.

    Args:
        layout: of every parameter.
        parameters: each is asked for once, in their own order, and not kept.

    Raises:
        UserError: it cannot be written; a model that was there before is still whole then.
    """
    directory = Path(directory)
    with atomic_files(directory / WEIGHTS_FILE, directory / CONFIG_FILE) as (weights, described_in):
        fingerprint = _write(weights, config, layout, parameters)
        values = described(config, inner, fingerprint, tokenizer_fingerprint, extra, learns=learns)
        write_json(described_in, values, kind=KIND)
    return fingerprint


def stream_safetensors(
    path: Path, layout: Mapping[str, ParameterSpec], parameters: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, in place; each of `parameters` is asked for once, in their own order, and not kept.

    Where they come from can so be read in its own order; the file is the same.
    """
    if set(parameters) != set(layout):
        raise ValueError("the parameters are not those of the layout")
    header = _header(layout, metadata)
    starts, end = {}, len(header)
    for name in _order(layout):
        starts[name] = end
        end += layout[name].nbytes
    with path.open("wb") as file:
        file.write(header)
        for name in parameters:
            file.seek(starts[name])
            file.write(_bytes(name, parameters[name], layout[name]))  # and nothing of it is kept


def _bytes(name: str, tensor: Tensor, expected: ParameterSpec) -> memoryview:
    if (tuple(tensor.shape), tensor.dtype) != expected:
        raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not {expected}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(
    path: Path, config: ModelConfig, layout: Mapping[str, ParameterSpec], parameters: Mapping[str, Tensor]
) -> str:
    """The tensor file. What its header says about all of them is put there in the end, in the same place."""
    stream_safetensors(path, layout, parameters, _entry(_NO_DIGEST, _NO_DIGEST))
    with _Written(path) as written:
        fingerprint = fingerprint_of_parts(config, written)
        sha256 = digest(_facts(fingerprint), written)
    with path.open("r+b") as file:
        file.write(_header(layout, _entry(fingerprint, sha256)))
    return fingerprint


def _facts(fingerprint: str) -> dict[str, Any]:
    """The header that `longread.files.write_tensors` gives a file, but for its checksum."""
    return {"format_version": FORMAT_VERSION, "kind": KIND, "metadata": {"fingerprint": fingerprint}}


def _entry(fingerprint: str, sha256: str) -> dict[str, str]:
    return {FORMAT: json.dumps(_facts(fingerprint) | {"sha256": sha256}, sort_keys=True)}


def _order(layout: Mapping[str, ParameterSpec]) -> list[str]:
    """The widest types first, so that every tensor is aligned."""
    return sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))


def _header(layout: Mapping[str, ParameterSpec], metadata: Mapping[str, str]) -> bytes:
    """Of a safetensors file: its length, and JSON padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in _order(layout):
        shape, dtype = layout[name]
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [end, end + layout[name].nbytes]}
        end += layout[name].nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Written(Mapping[str, Tensor]):
    """The tensors of a file, each mapped when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")

    def __enter__(self) -> _Written:
        self._file.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.__exit__(*raised)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)
