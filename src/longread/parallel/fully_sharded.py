"""Parameters of which each rank holds its rows alone, whole only while they are used: FSDP2 of PyTorch.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. A module's parameters are gathered before its
forward and their gradients are summed and divided after its backward. What runs between, inner steps and the second
run of what was not kept included, sees ordinary tensors. So the whole loss is one `forward`, that of the root.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longread.config import UserError
from longread.parallel.rows import DividedRows, _Piece

if TYPE_CHECKING:  # seconds to import
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class FullySharded(DividedRows):
    """The trained parameters of a model whose parameters are divided too. An optimizer steps `own` as it does there."""

    def __init__(
        self,
        root: nn.Module,
        model: nn.Module,
        units: Sequence[tuple[nn.Module, str]],
        mesh: DeviceMesh,
        *,
        reshard: bool = True,
    ) -> None:
        """Divides the parameters of `root` in place; all ranks hold the same before.

        Args:
            root: its forward gives the loss; its parameters, but for those of `units`, are whole from its forward to
                the end of its backward.
            model: a part of `root`, by whose names parameters go.
            units: modules of `model` with the name of the method that uses their parameters.
            mesh: a `row_mesh`.
            reshard: units are divided again after their forward, and every micro-batch sums its gradients: least
                memory. Otherwise units stay whole until their backward, and the last micro-batch sums.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for module, method in units:
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
            register_fsdp_forward_method(module, method)
        self.root = fully_shard(root, mesh=mesh, reshard_after_forward=False)
        self._units = [self.root, *(cast("FSDPModule", module) for module, _ in units)]
        self._reshard = reshard
        self._counted: Tensor | None = None
        """Sequences with a target, of all micro-batches so far."""
        self._has_unsummed = False
        """Whole gradients lie where FSDP keeps them."""
        super().__init__({name: p for name, p in model.named_parameters() if p.requires_grad}, mesh)

    def _rows_of(self, piece: _Piece) -> nn.Parameter:
        return nn.Parameter(cast("DTensor", self.parameters[piece.name].detach()).to_local())

    def backward(self, loss: Tensor, count: Tensor, *, last: bool = True) -> None:
        """Adds the gradient of a micro-batch. All ranks call it together, as often as each other.

        Args:
            loss: what the forward of `root` gave, the mean over `count` sequences.
            count: int [].
            last: whether this is the last micro-batch before `reduce`.
        """
        sums = last or self._reshard
        self.root.set_requires_gradient_sync(sums)
        (loss * count).backward()
        self._has_unsummed = not sums
        self._counted = count if self._counted is None else self._counted + count

    @torch.no_grad()
    def reduce(self, weight: float) -> None:
        """Gives `own` the mean gradient over the sequences of all ranks; they were summed on the way.

        Args:
            weight: this rank's share of the sequences that were counted.

        Raises `ValueError` if it is not, or if gradients have not come by `backward`.
        """
        if self._counted is None or self._has_unsummed:
            raise ValueError("gradients of fully sharded parameters come by FullySharded.backward, to its last call")
        total = self._counted.double()
        dist.all_reduce(total)
        if total and abs(weight * total - self._counted) > 1e-6 * total:
            raise ValueError(f"a weight of {weight} is not {self._counted} of {total:.0f} sequences")
        scale = dist.get_world_size() / max(1.0, total.item())  # FSDP has divided by the number of ranks
        for name, rows in self.own.items():
            summed = self.parameters[name].grad
            if summed is not None:
                rows.grad = cast("DTensor", summed).to_local().mul_(scale)

    def unsummed(self) -> dict[str, Tensor]:
        """None: FSDP keeps sums alone."""
        return {}

    def gather(self) -> None:
        """Nothing: the next forward gathers."""

    def clear(self) -> None:
        """Forgets all gradients. All ranks call it together."""
        if self._has_unsummed:
            for module in self._units:
                module.unshard()
                cast("nn.Module", module).zero_grad(set_to_none=True)
                module.reshard()
        self._has_unsummed, self._counted = False, None
        super().clear()


def whole_tensors(model: nn.Module, device: str | torch.device, *, on_all: bool) -> dict[str, Tensor]:
    """The whole tensors of a model whose parameters are divided, copied to `device`: on all ranks, or on rank 0 alone.

    All ranks call it together; elsewhere it is empty. One parameter after the other is whole on a rank's own device.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = cast("DTensor", tensor).full_tensor() if is_divided(tensor) else tensor
        if on_all or dist.get_rank() == 0:
            found[name] = whole.detach().to(device, copy=True)
        del whole
    return found


@torch.no_grad()
def fill_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fills a model whose parameters are divided: each rank takes its rows of whole `tensors`, and none waits.

    Raises `UserError` if one is missing or of another shape; the model is then as it was.
    """
    places = model.state_dict()
    for name, place in places.items():
        if name not in tensors or tensors[name].shape != place.shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise UserError(f"{name} is {found}, but the model's is {tuple(place.shape)}; fill it with its own tensors")
    for name, place in places.items():
        rows, first = place, 0
        if is_divided(place):
            divided = cast("DTensor", place)
            rows = divided.to_local()
            ranks = divided.device_mesh[divided.device_mesh.mesh_dim_names[-1]]  # type: ignore[index]
            first = -(-place.shape[0] // ranks.size()) * ranks.get_local_rank()
        rows.copy_(tensors[name][first : first + len(rows)] if place.dim() else tensors[name])


def is_divided(tensor: Tensor) -> bool:
    """Whether a rank holds a part of it alone: a DTensor, known by its mesh, for the class takes long to import."""
    return hasattr(tensor, "device_mesh")
