"""Parameters whose rows are divided among ranks: gradients come together, new values go round.

Every rank holds all parameters whole and computes the gradient of its own sequences. The gradients are summed and each
rank keeps the sum of its rows (reduce-scatter), the optimizer steps these rows and holds moments for them alone, and
what it has made goes to all others, in place (all-gather). That is the first two stages of ZeRO (arXiv 1910.02054).
Rows are divided as `torch.chunk` and DTensor's `Shard(0)` do it.

Ranks of one machine divide rows, machines repeat them: between machines only sums of a rank's own rows travel, a share
of the gradient as small as the machine has ranks. Addresses of parameters never change, so CUDA graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

BUCKET_BYTES = 128 * 2**20
"""Of gradients that travel together: enough to keep a link busy, and few beside the parameters."""
REPEATED, DIVIDED = "machines", "rows"
"""Names of the two dimensions of a mesh: ranks that repeat the same rows, and ranks that divide them."""


# torch 2.13 gave both new names
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Piece(NamedTuple):
    """A parameter in a bucket."""

    name: str
    rows: int
    """Of each rank, but for the last ones, which may have fewer or none."""
    width: int
    """Numbers in a row."""

    @property
    def size(self) -> int:
        return self.rows * self.width


def row_mesh(size: int, divided: int, device_type: str) -> DeviceMesh:
    """`size` ranks, of which each `divided` neighbours divide rows. All ranks make it together."""
    return init_device_mesh(device_type, (size // divided, divided), mesh_dim_names=(REPEATED, DIVIDED))


class DividedRows:
    """The trained parameters of a model, divided; without a mesh they are the parameters themselves."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mesh: DeviceMesh | None = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """`mesh` is a `row_mesh`. Parameters are taken in their order, the same on all ranks."""
        self.parameters, self.mesh = dict(parameters), mesh
        self.count = 1 if mesh is None else mesh[DIVIDED].size()
        self.index = 0 if mesh is None else mesh[DIVIDED].get_local_rank()
        self._buckets = list(self._filled(bucket_bytes))
        self.own: dict[str, nn.Parameter] = {}
        """This rank's rows of each parameter, as views of it; what an optimizer steps."""
        for bucket in self._buckets:
            for piece in bucket:
                self.own[piece.name] = self._rows_of(piece)

    def _filled(self, most: int) -> Iterator[list[_Piece]]:
        bucket: list[_Piece] = []
        held, dtype = 0, None
        for name, parameter in self.parameters.items():
            piece = _Piece(name, -(-parameter.shape[0] // self.count), parameter.shape[1:].numel())
            size = piece.size * self.count * parameter.itemsize
            if bucket and (held + size > most or parameter.dtype != dtype):
                yield bucket
                bucket, held = [], 0
            bucket.append(piece)
            held, dtype = held + size, parameter.dtype
        if bucket:
            yield bucket

    def _rows_of(self, piece: _Piece) -> nn.Parameter:
        parameter = self.parameters[piece.name]
        if self.count == 1:
            return parameter
        return nn.Parameter(parameter.detach()[self.index * piece.rows : (self.index + 1) * piece.rows])

    def reduce(self, weight: float) -> None:
        """Gives `own` the sum over ranks of `weight` times the gradients of the parameters.

        All ranks call it together, each with a gradient for the same parameters. Those stay as they are.
        """
        if self.mesh is None:
            return
        for bucket in self._buckets:
            due = [piece for piece in bucket if self.parameters[piece.name].grad is not None]
            if not due:
                continue
            mine = self._sum(self._packed(due, weight))
            start = 0
            for piece in due:
                rows = self.own[piece.name]
                rows.grad = mine[start : start + rows.numel()].view_as(rows)
                start += piece.size

    def _packed(self, pieces: list[_Piece], weight: float) -> Tensor:
        """Gradients [ranks, numbers of a rank], short ones padded."""
        like = self.parameters[pieces[0].name]
        packed = like.new_zeros(self.count, sum(piece.size for piece in pieces))
        start = 0
        for piece in pieces:
            gradient = self.parameters[piece.name].grad
            if gradient is not None:
                for place, rows in self._places(packed, start, piece, gradient):
                    torch.mul(rows, weight, out=place)
            start += piece.size
        return packed

    def _places(self, packed: Tensor, start: int, piece: _Piece, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of views, of a bucket and of a whole tensor with the same rows: one where ranks have equally many."""
        part = packed[:, start : start + piece.size]
        if piece.rows * self.count == whole.shape[0]:
            yield part, whole.reshape(self.count, -1)
            return
        for index in range(self.count):
            rows = whole[index * piece.rows : (index + 1) * piece.rows]
            yield part[index, : rows.numel()], rows.reshape(-1)

    def _sum(self, packed: Tensor) -> Tensor:
        """This rank's row of the sum over all ranks."""
        if self.mesh is None:
            return packed[0]
        mine = packed[0]
        if self.count > 1:
            mine = torch.empty_like(packed[0])
            _reduce_scatter(mine, packed.view(-1), group=self.mesh[DIVIDED].get_group())
        if self.mesh[REPEATED].size() > 1:
            dist.all_reduce(mine, group=self.mesh[REPEATED].get_group())
        return mine

    @torch.no_grad()
    def gather(self) -> None:
        """Puts what every rank has made of its rows into the parameters of all. All ranks call it together."""
        if self.mesh is None or self.count == 1:
            return
        for bucket in self._buckets:
            like = self.parameters[bucket[0].name]
            mine = like.new_zeros(sum(piece.size for piece in bucket))
            start = 0
            for piece in bucket:
                rows: Tensor = self.own[piece.name]
                mine[start : start + rows.numel()].copy_(rows.view(-1))
                start += piece.size
            packed = like.new_empty(self.count, len(mine))
            _all_gather(packed.view(-1), mine, group=self.mesh[DIVIDED].get_group())
            start = 0
            for piece in bucket:
                for place, rows in self._places(packed, start, piece, self.parameters[piece.name].detach()):
                    rows.copy_(place)
                start += piece.size

    def norm(self) -> Tensor:
        """L2 norm over the gradients of all rows together, [], the same on all ranks."""
        mine = torch.nn.utils.get_total_norm([rows.grad for rows in self.own.values() if rows.grad is not None])
        if self.count == 1 or self.mesh is None:
            return mine
        square = mine.square()
        dist.all_reduce(square, group=self.mesh[DIVIDED].get_group())
        return square.sqrt()

    def clear(self) -> None:
        """Forgets all gradients."""
        for tensor in (*self.parameters.values(), *self.own.values()):
            tensor.grad = None
