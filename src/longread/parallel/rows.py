"""Parameters whose rows are divided among ranks: gradients come together, new values go round.

Every rank holds all parameters whole and computes the gradient of its own sequences. The gradients are summed and each
rank keeps the sum of its rows (reduce-scatter), the optimizer steps these rows and holds moments for them alone, and
what it has made goes to all others, in place (all-gather). That is the first two stages of ZeRO (arXiv 1910.02054).
Rows are divided as `torch.chunk` and DTensor's `Shard(0)` do it.

Ranks of one machine divide rows, machines repeat them: between machines only sums of a rank's own rows travel, a share
of the gradient as small as the machine has ranks. Addresses of parameters never change, so CUDA graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longread.parallel.world import DEADLINE, all_gather, group_of

BUCKET_BYTES = 128 * 2**20
"""Of gradients that travel together: enough to keep a link busy, and few beside the parameters."""
DIRECT_BYTES = 16 * 2**20
"""Of a parameter that travels from where it lies, without a bucket, if all ranks have as many of its rows."""
REPEATED, DIVIDED = "machines", "rows"
"""Names of the two dimensions of a mesh: ranks that repeat the same rows, and ranks that divide them."""


_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Its name since torch 2.13."""


class _Piece(NamedTuple):
    """A parameter in a bucket."""

    name: str
    rows: int
    """Of each rank, but for the last ones, which may have fewer or none."""
    width: int
    """Numbers in a row."""
    direct: bool
    """It lies in memory as it travels: rank by rank."""

    @property
    def size(self) -> int:
        return self.rows * self.width


def row_mesh(size: int, divided: int, device_type: str, deadline: float = DEADLINE) -> DeviceMesh:
    """`size` ranks, of which each `divided` neighbours divide rows. All ranks make it together.

    Args:
        deadline: seconds that a rank waits for others.
    """
    ranks = torch.arange(size).view(-1, divided)
    repeated, dividing = (group_of(lines.tolist(), deadline) for lines in (ranks.t(), ranks))
    return DeviceMesh.from_group([repeated, dividing], device_type, mesh=ranks, mesh_dim_names=(REPEATED, DIVIDED))


def _two_at_a_time(buckets: Iterable[Iterator[None]]) -> Iterator[None]:
    """Runs each to its `yield`, and the one before to its end: one is packed while another travels."""
    before: Iterator[None] | None = None
    for bucket in buckets:
        next(bucket)
        if before is not None:
            yield from before
        before = bucket
    if before is not None:
        yield from before


class DividedRows:
    """The trained parameters of a model, divided; without a mesh they are the parameters themselves."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mesh: DeviceMesh | None = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        direct_bytes: int = DIRECT_BYTES,
    ) -> None:
        """`mesh` is a `row_mesh`. Parameters are taken in their order, the same on all ranks."""
        self.parameters, self.mesh = dict(parameters), mesh
        self.count = 1 if mesh is None else mesh[DIVIDED].size()
        self.index = 0 if mesh is None else mesh[DIVIDED].get_local_rank()
        # kept, as a mesh takes longer to find them than a collective to begin
        self._dividing = None if mesh is None else mesh[DIVIDED].get_group()
        self._repeating = None if mesh is None or mesh[REPEATED].size() == 1 else mesh[REPEATED].get_group()
        self._buckets = list(self._filled(bucket_bytes, direct_bytes))
        self.own: dict[str, nn.Parameter] = {}
        """This rank's rows of each parameter, as views of it; what an optimizer steps."""
        for bucket in self._buckets:
            for piece in bucket:
                self.own[piece.name] = self._rows_of(piece)

    def _filled(self, bucket_bytes: int, direct_bytes: int) -> Iterator[list[_Piece]]:
        """Pieces that travel together; one that travels directly is alone."""
        bucket: list[_Piece] = []
        held, dtype = 0, None
        for name, parameter in self.parameters.items():
            rows = -(-parameter.shape[0] // self.count)
            size = rows * self.count * parameter.shape[1:].numel() * parameter.itemsize
            direct = size >= direct_bytes and rows * self.count == parameter.shape[0] and self.count > 1
            piece = _Piece(name, rows, parameter.shape[1:].numel(), direct)
            if direct:
                yield [piece]
                continue
            if bucket and (held + size > bucket_bytes or parameter.dtype != dtype):
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

        All ranks call it together, each with a gradient for the same parameters; large ones are multiplied in place.
        """
        if self.mesh is None:
            return
        due = [[p for p in bucket if self.parameters[p.name].grad is not None] for bucket in self._buckets]
        for _ in _two_at_a_time(self._reduced(pieces, weight) for pieces in due if pieces):
            pass

    def _reduced(self, pieces: list[_Piece], weight: float) -> Iterator[None]:
        """Of one bucket: yields once its sum is under way."""
        gradients = [cast("Tensor", self.parameters[piece.name].grad) for piece in pieces]
        if pieces[0].direct and gradients[0].is_contiguous():
            packed = gradients[0].view(self.count, -1)
        else:
            packed = self._bucket(pieces)
            torch._foreach_copy_(*self._places(packed, pieces, gradients))
        packed.mul_(weight)
        mine, work = self._sum(packed)
        yield
        if work is not None:
            work.wait()
        if self._repeating is not None:
            dist.all_reduce(mine, group=self._repeating)
        start = 0
        for piece in pieces:
            rows = self.own[piece.name]
            rows.grad = mine[start : start + rows.numel()].view_as(rows)
            start += piece.size

    def _bucket(self, pieces: list[_Piece]) -> Tensor:
        """For numbers of all ranks, [ranks, numbers of a rank]; 0 where a rank has fewer rows than others."""
        like = self.parameters[pieces[0].name]
        even = all(piece.rows * self.count == self.parameters[piece.name].shape[0] for piece in pieces)
        return (like.new_empty if even else like.new_zeros)(self.count, sum(piece.size for piece in pieces))

    def _places(self, packed: Tensor, pieces: list[_Piece], wholes: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Views of a bucket and of whole tensors with the same numbers; one pair where all ranks have as many rows."""
        places, rows, start = [], [], 0
        for piece, whole in zip(pieces, wholes, strict=True):
            part = packed[:, start : start + piece.size]
            start += piece.size
            if piece.rows * self.count == whole.shape[0]:
                places.append(part)
                rows.append(whole.reshape(self.count, -1))
                continue
            for index, cut in enumerate(whole.split(piece.rows)):
                places.append(part[index, : cut.numel()])
                rows.append(cut.reshape(-1))
        return places, rows

    def _sum(self, packed: Tensor) -> tuple[Tensor, Any]:
        """This rank's row of the sum over those that divide rows, and the work that must end before."""
        if self.count == 1:
            return packed[0], None
        mine = torch.empty_like(packed[0])
        return mine, _reduce_scatter(mine, packed.view(-1), group=self._dividing, async_op=True)

    @torch.no_grad()
    def gather(self) -> None:
        """Puts what every rank has made of its rows into the parameters of all. All ranks call it together."""
        if self.count > 1:
            for _ in _two_at_a_time(self._gathered(pieces) for pieces in self._buckets):
                pass

    def _gathered(self, pieces: list[_Piece]) -> Iterator[None]:
        """Of one bucket: yields once its rows are under way."""
        if pieces[0].direct:
            place, own_rows = self.parameters[pieces[0].name].detach(), self.own[pieces[0].name].detach()
            work = all_gather(place.view(-1), own_rows.view(-1), group=self._dividing, async_op=True)
            yield
            work.wait()
            return
        packed = self._bucket(pieces)
        mine, start = torch.zeros_like(packed[0]), 0
        own = [self.own[piece.name].detach().view(-1) for piece in pieces]
        places = []
        for piece, rows in zip(pieces, own, strict=True):
            places.append(mine[start : start + len(rows)])
            start += piece.size
        torch._foreach_copy_(places, own)
        work = all_gather(packed.view(-1), mine, group=self._dividing, async_op=True)
        yield
        work.wait()
        wholes = [self.parameters[piece.name].detach() for piece in pieces]
        places, rows_of_all = self._places(packed, pieces, wholes)
        torch._foreach_copy_(rows_of_all, places)

    def unsummed(self) -> dict[str, Tensor]:
        """The gradients of this rank alone, as far as they are still known."""
        if self.mesh is not None and self.count == 1:  # the sums have taken their places
            return {}
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def norm(self) -> Tensor:
        """L2 norm over the gradients of all rows together, [], the same on all ranks."""
        mine = torch.nn.utils.get_total_norm([rows.grad for rows in self.own.values() if rows.grad is not None])
        if self.count == 1:
            return mine
        square = mine.square()
        dist.all_reduce(square, group=self._dividing)
        return square.sqrt()

    def clear(self) -> None:
        """Forgets all gradients."""
        for tensor in (*self.parameters.values(), *self.own.values()):
            tensor.grad = None
