"""The parameters of a reader, each made from the source's tensors when it is asked for.

What is folded into them, so that the network need not know it: the order of rotary pairs (rows of queries and keys,
their biases, the gains of their norms), 1 + w of Gemma's norms, the divisor of its scores, yarn's attention factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from longread.config import ModelConfig, UserError
from longread.model import undrawn
from longread.pretrained.families import Network
from longread.pretrained.schemes import Scheme, largest_units
from longread.pretrained.source import Stored, TensorSource

_TURNED = ("attention.query", "attention.key", "attention.query_norm", "attention.key_norm")


class ReaderWeights(Mapping[str, Tensor]):
    """All parameters of a reader by name; nothing is kept.

    Args:
        dtype: of matrices; None: that of the source's if all have one, else float32. Gains and biases, which are few,
            are float32 at least.

    Raises:
        UserError: the source lacks a tensor, has one too many, or one of another shape.
    """

    def __init__(
        self, network: Network, source: TensorSource, config: ModelConfig, scheme: Scheme, dtype: torch.dtype | None
    ) -> None:
        self._network, self._source, self._config, self._scheme = network, source, config, scheme
        shapes = {name: tuple(tensor.shape) for name, tensor in undrawn(config).state_dict().items()}
        used = self._check(shapes)
        self.dtype = dtype or _common([stored for stored in used if len(stored.shape) == 2])
        self.layout = {name: Stored(shape, self._dtype(shape)) for name, shape in shapes.items()}
        self._units: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, name: str) -> Tensor:
        return self._made(name).to(self.layout[name].dtype).contiguous()

    def _dtype(self, shape: tuple[int, ...]) -> torch.dtype:
        if len(shape) == 2 or self.dtype == torch.float64:
            return self.dtype
        return torch.float32

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Stored]:
        """The source's tensors that are used: none is missing, none left over."""
        where, found, used = self._source.where, self._source.tensors, {}
        for name, shape in shapes.items():
            if ".fast_mlp." in name:
                continue
            theirs = self._theirs(name)
            if theirs not in found:
                raise UserError(f"{where} lacks the weight {theirs}; fetch it again, or give another model")
            if found[theirs].shape != shape:
                raise UserError(
                    f"{where}: {theirs} has shape {found[theirs].shape}, but its config asks for {shape}; "
                    "fetch both again"
                )
            used[theirs] = found[theirs]
        for name in found:
            if name not in used and not self._is_superfluous(name):
                raise UserError(
                    f"{where} holds the weight {name}, which a {self._network.family} model of Longread has no place "
                    "for; give another model"
                )
        return list(used.values())

    def _is_superfluous(self, name: str) -> bool:
        """Whether leaving a tensor out changes nothing."""
        if self._source.is_ignored(name):
            return True
        if self._config.tie_embeddings and name == self._theirs("head.weight"):
            return True
        outputs = {self._theirs(f"blocks.{i}.attention.output.bias") for i in range(self._config.num_blocks)}
        return name in outputs and not self._source.read(name).any()

    def _theirs(self, name: str) -> str:
        return self._source.name_of(name, post_norm=self._config.post_norm)

    def _made(self, name: str) -> Tensor:
        if ".fast_mlp." in name:
            return self._of_fast_mlp(name)
        if self._scheme == "in-place" and name.startswith("blocks.") and ".static_mlp." in name:
            block = int(name.split(".")[1])
            last = "post_norm" if self._config.post_norm else "down"
            if block >= self._config.num_prefix_blocks and f".{last}." in name:
                return torch.zeros(self.layout[name].shape)  # with a norm behind it a product of 0 is ill-conditioned
        return self._read(name)

    def _of_fast_mlp(self, name: str) -> Tensor:
        static = name.replace("fast_mlp", "static_mlp")
        if self._scheme == "in-place":
            return self._read(static)
        if ".down." in name:
            return torch.zeros(self.layout[name].shape)
        matrix = self._read(static)
        if matrix.dim() == 1 or self._config.fast_mlp_hidden == self._config.mlp_hidden:
            return matrix
        return matrix[self._units_of(int(name.split(".")[1]))]

    def _units_of(self, block: int) -> Tensor:
        """The units of a block's MLP that its fast MLP has."""
        if self._units is None or self._units[0] != block:
            matrices = (self._read(f"blocks.{block}.static_mlp.{part}.weight") for part in ("gate", "up", "down"))
            self._units = block, largest_units(*matrices, count=self._config.fast_mlp_hidden)
        return self._units[1]

    def _read(self, name: str) -> Tensor:
        """A parameter of the plain network."""
        network, tensor = self._network, self._source.read(self._theirs(name))
        part = name.rpartition(".")[0]
        is_gain = tensor.dim() == 1 and name.endswith("norm.weight")
        if is_gain and network.gain_offset:
            tensor = _wide(tensor) + network.gain_offset
        if not part.endswith(_TURNED):
            return tensor
        if network.half_split:
            tensor = interleaved(tensor, self._config.head_dim)
        factor = self._factor(name)
        return tensor if factor == 1 else _wide(tensor) * factor

    def _factor(self, name: str) -> float:
        """The factor of a parameter of queries or keys: the norm's gain if there is a norm, else the matrix."""
        block = int(name.split(".")[1])
        if self._config.qk_norm != name.endswith("_norm.weight"):
            return 1.0
        factor = self._network.rotary_factor if self._config.rope_of(block) == "global" else 1.0
        return factor * (self._network.query_factor if ".query" in name else 1.0)


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of heads [N · H, ...] whose rotary pairs are (i, i + H/2), with pairs (2i, 2i + 1)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleaved`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _common(matrices: list[Stored]) -> torch.dtype:
    """One type that holds every number exactly: the only one there is, or float32."""
    kinds = {stored.dtype for stored in matrices}
    if torch.float64 in kinds:
        return torch.float64
    return kinds.pop() if len(kinds) == 1 else torch.float32
