"""DCP's storage in tensor files: a file of each rank, which says where in the whole tensors its pieces lie.

    optimizer-00002-of-00004.safetensors    a tensor file (longread.files); its metadata: the step, and of every tensor
                                            the whole shape and where the piece begins

torch.distributed.checkpoint (https://docs.pytorch.org/docs/stable/distributed.checkpoint.html) decides which rank
writes which piece, and which pieces make what a rank reads. Its own files are pickles; these are none.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from longread.checkpoint.streamed import DTYPES
from longread.config import UserError
from longread.files import open_tensors, write_tensors

PIECES = "optimizer-*-of-*.safetensors"
KIND = "pieces of the optimizer"
T = TypeVar("T")


class PieceWriter(StorageWriter):
    """Writes what DCP's plan gives this rank into one file, also if that is nothing."""

    def __init__(self, directory: Path, step: int, say: Callable[[str], None]) -> None:
        """`directory` exists; `say` is told what this rank is doing."""
        self._directory, self._step, self._say = directory, step, say
        self.file = directory
        """The file, as soon as it is known."""
        self.error: Exception | None = None
        """Why it could not be written. DCP does not hear of it: with some versions of Python it cannot pass errors on,
        and ranks would wait for one that has left."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=(rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self._say("writing its rows")
        try:
            self._write(plan, planner)
        except Exception as error:
            self.error = error
        self._say("its rows are written")
        return _done([])  # nobody needs to know where pieces lie: the files say it

    def _write(self, plan: SavePlan, planner: SavePlanner) -> None:
        rank, size = plan.storage_data
        self.file = self._directory / f"optimizer-{rank + 1:05d}-of-{size:05d}.safetensors"
        tensors, shapes, offsets = {}, {}, {}
        for item in plan.items:
            name, data, tensor = item.index.fqn, item.tensor_data, planner.resolve_data(item)
            if not isinstance(tensor, torch.Tensor) or data is None:
                raise TypeError(f"{name} is no tensor")
            tensors[name], shapes[name], offsets[name] = tensor, list(data.size), list(data.chunk.offsets)
        metadata = {"step": self._step, "files": size, "shapes": shapes, "offsets": offsets}
        write_tensors(self.file, tensors, metadata, kind=KIND)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left to do: there is no index beside the files."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


class PieceReader(StorageReader):
    """Reads pieces, or parts of them, from the files of however many ranks.

    Nothing is checked but that all is there: `verify_checkpoint` comes before.
    """

    def __init__(self, directory: Path) -> None:
        """Raises `UserError` if a file or a part of a tensor is missing."""
        self.tensors: dict[str, TensorStorageMetadata] = {}
        """All that there are: shapes, types and pieces."""
        self._files: dict[MetadataIndex, Path] = {}
        paths = sorted(directory.glob(PIECES))
        for path in paths:
            with open_tensors(path, kind=KIND) as (file, metadata):
                if metadata["files"] != len(paths):
                    raise UserError(
                        f"{path} is one of {metadata['files']} files, of which {len(paths)} are there; "
                        "use an older checkpoint"
                    )
                for name in file.keys():  # noqa: SIM118 - no mapping
                    self._note(path, name, file.get_slice(name), metadata)
        for name, tensor in self.tensors.items():
            if sum(piece.sizes.numel() for piece in tensor.chunks) != tensor.size.numel():
                raise UserError(f"{directory} lacks a part of {name}; use an older checkpoint")

    def _note(self, path: Path, name: str, part: Any, metadata: dict[str, Any]) -> None:
        if name not in self.tensors:
            properties = TensorProperties(DTYPES[part.get_dtype()])
            self.tensors[name] = TensorStorageMetadata(properties, torch.Size(metadata["shapes"][name]), [])
        piece = ChunkStorageMetadata(torch.Size(metadata["offsets"][name]), torch.Size(part.get_shape()))
        self.tensors[name].chunks.append(piece)
        self._files[MetadataIndex(name, piece.offsets)] = path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({**self.tensors})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[Path, list[Any]] = {}
        for item in plan.items:
            wanted.setdefault(self._files[item.storage_index], []).append(item)
        for path, items in wanted.items():
            with open_tensors(path, kind=KIND) as (file, _):
                for item in items:
                    ranges = [slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True)]
                    name = item.storage_index.fqn
                    part = file.get_slice(name)[tuple(ranges)] if ranges else file.get_tensor(name)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
