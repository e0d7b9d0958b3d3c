"""CUDA graphs for a CPU: what is captured is recorded operation by operation, left undone, and done by each replay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longread.inner_loop import finishing, graphs, reading

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")


def tensors_of(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def memory_of(x: Tensor) -> Tensor:
    """All of it, as numbers of the same type."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())


class _Recording(TorchDispatchMode):
    """Operations on the same tensors, to be done again; one that waits for the device cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, Tensor] = {}
        """By address, memory of the graph's own."""
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}
        """By address, memory that was there before, and what was in it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in WAITS:
            raise RuntimeError(f"{function.name()} waits for the device")
        kwargs = kwargs or {}
        arguments = function._schema.arguments
        given = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors_of(given.get(argument.name)):
                    if place(x) not in self.made and place(x) not in self.changed:
                        self.changed[place(x)] = memory_of(x), memory_of(x).clone()
        known = {place(x) for x in tensors_of((args, kwargs))}
        result = function(*args, **kwargs)
        self.made |= {place(x): memory_of(x) for x in tensors_of(result) if place(x) not in known}
        self.calls.append((function, args, kwargs, result))
        return result

    def undo(self) -> None:
        for memory, before in self.changed.values():
            memory.copy_(before)
        for x in self.made.values():
            if x.is_floating_point():
                x.fill_(torch.nan)


class FakeGraph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    off = 0.0
    """Added to every floating-point number that a replay makes or changes."""

    def __init__(self) -> None:
        self.recording = _Recording()

    def pool(self) -> str:
        return "pool"

    @torch.no_grad()
    def replay(self) -> None:
        before = [(x, x.clone()) for x, _ in self.recording.changed.values() if self.off]
        for function, args, kwargs, recorded in self.recording.calls:
            for old, new in zip(tensors_of(recorded), tensors_of(function(*args, **kwargs)), strict=True):
                if place(old) != place(new):
                    old.detach().copy_(new)
        for x in self.recording.made.values() if self.off else ():
            if x.is_floating_point():
                x += self.off
        for x, old in before:
            if x.is_floating_point():
                x[x != old] += self.off


class _Stream:
    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> None: ...


@contextlib.contextmanager
def _graph(
    graph: FakeGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    with graph.recording:
        yield
    graph.recording.undo()


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    """As if every device had CUDA graphs. Set `off` of the class by `monkeypatch`."""
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "graph": _graph,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    set_capturing(monkeypatch, on=True)
    return FakeGraph


def set_capturing(patch: pytest.MonkeyPatch, *, on: bool) -> None:
    """Whether texts are read, and steps taken, as CUDA graphs wherever that is possible, or never."""
    for module in (finishing, reading):
        patch.setattr(module, "can_capture", lambda device: on)
