"""The arrays of an Orbax checkpoint, one at a time. tensorstore reads them; neither orbax-checkpoint nor JAX is needed.

    RUN/STEP/ITEM/              what a CheckpointManager of Orbax writes: one item of the state at one step
        _METADATA               JSON: every leaf of the tree, and how arrays were written
        manifest.ocdbt, d/, …   all arrays, in one OCDBT database (the default), or
        LEAF/                   a folder for each array; LEAF is its path in the tree, joined by dots

Either way an array is Zarr, of format 2 (the default) or 3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longread.config import UserError
from longread.extras import install_command

_METADATA, _MANIFEST = "_METADATA", "manifest.ocdbt"
_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16)}
_DTYPES["bfloat16"] = torch.bfloat16


class Leaf(NamedTuple):
    """An array before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def find_orbax_item(path: str | Path, item: str) -> Path | None:
    """The folder of `item` where `path` is that folder, a step that has it, or a run, of which the newest step counts.

    None where `path` is none of these.
    """
    path = Path(path).expanduser()
    if (path / item).is_dir():
        return path / item
    if (path / _METADATA).is_file() or (path / _MANIFEST).is_file():
        return path
    try:
        steps = [step for step in path.iterdir() if step.name.isdecimal() and (step / item).is_dir()]
    except OSError:
        return None
    return max(steps, key=lambda step: int(step.name)) / item if steps else None


class OrbaxArrays:
    """The arrays of one item.

    Raises:
        UserError: tensorstore is not installed; the item is incomplete or damaged, as far as that shows before arrays
            are read; an array holds no floating-point numbers.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import tensorstore
        except ImportError:
            raise UserError(f"Orbax checkpoints need tensorstore; run {install_command('orbax')}") from None
        self.directory = directory
        self._tensorstore = tensorstore
        self._base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory.absolute()}/"}}
        self._is_database = (directory / _MANIFEST).is_file()
        expected, self._is_dense = self._read_metadata()
        drivers = self._find()
        for name in expected:
            if name not in drivers:
                raise UserError(f"{directory} lacks the array {name}, which its {_METADATA} lists; copy it again")
        self._stores = {name: self._open(name, driver) for name, driver in sorted(drivers.items())}
        self.leaves = {name: self._leaf(name, store) for name, store in self._stores.items()}
        """Each array by its path in the tree, joined by dots."""

    def read(self, name: str) -> Tensor:
        """One array, in memory of its own. Raises `UserError` if it is damaged."""
        try:
            array = self._stores[name].read().result()
        except Exception as error:  # the library raises ValueError, and others, for whatever is wrong
            raise self._damaged(name, error) from None
        if self.leaves[name].dtype == torch.bfloat16:  # which NumPy has from another package
            return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
        return torch.from_numpy(array)

    def _read_metadata(self) -> tuple[list[str], bool]:
        """The arrays that the tree has, and whether chunks that hold nothing but fill values were written too."""
        path = self.directory / _METADATA
        try:
            values = json.loads(path.read_bytes())
            leaves = values["tree_metadata"].values()
            arrays = [leaf for leaf in leaves if leaf["value_metadata"]["value_type"] not in ("None", "Dict", "List")]
            names = [".".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in arrays]
            return names, bool(values.get("store_array_data_equal_to_fill_value"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; copy the checkpoint again") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: it describes no tree of Orbax; copy the checkpoint again") from None

    def _find(self) -> dict[str, str]:
        """The driver of each array."""
        if self._is_database:
            try:
                keys = self._tensorstore.KvStore.open(self._base).result().list().result()
            except Exception as error:
                raise self._damaged(_MANIFEST, error) from None
            files = [key.decode().rpartition("/") for key in keys]
        else:
            folders = [folder for folder in self.directory.iterdir() if folder.is_dir()]
            files = [(folder.name, "/", name) for folder in folders for name in _DRIVERS if (folder / name).is_file()]
        found = {name: _DRIVERS[file] for name, _, file in files if file in _DRIVERS}
        if not found:
            raise UserError(
                f"{self.directory} holds no arrays: neither {_MANIFEST} nor folders with Zarr arrays; copy it again"
            )
        return found

    def _open(self, name: str, driver: str) -> Any:
        if self._is_database:
            store = self._base | {"path": f"{name}/"}
        else:
            store = {"driver": "file", "path": f"{(self.directory / name).absolute()}/"}
        # without the last entry a chunk that is not there would be read as zeros
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": not self._is_dense}
        try:
            return self._tensorstore.open(spec, open=True, read=True).result()
        except Exception as error:
            raise self._damaged(name, error) from None

    def _leaf(self, name: str, store: Any) -> Leaf:
        kind = store.dtype.name
        if kind not in _DTYPES:
            raise UserError(f"{self.directory}: {name} holds {kind}, no floating-point numbers; give a model's weights")
        return Leaf(tuple(store.shape), _DTYPES[kind])

    def _damaged(self, name: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split()).partition(" [")[0]
        return UserError(f"cannot read {name} of {self.directory}: {reason}; copy it again")
