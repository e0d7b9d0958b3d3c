"""The process beside the one that reads or trains: it notes which kernels a rehearsal launches, and compiles them.

`precompile.py` starts it. Nothing here runs anywhere else.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from longread.ops import fusible


def compile_noted(rehearsal: Callable[..., None], request: dict[str, Any]) -> None:
    """Compiles the kernels of a rehearsal; `request` says in how many forks, how long, and where to note the end."""
    from triton.runtime.cache import triton_key

    signal.alarm(request["longest"])
    trace_nothing()
    _keep(Path(request["key"]), triton_key())  # hashes hundreds of megabytes, once for all forks
    forks = Forks(request["workers"], request["longest"])
    forks.do(_build_driver)
    note_launches(rehearsal, request["arguments"], request["capability"], forks.do)
    if forks.all_well():
        Path(request["done"]).touch()


def _keep(place: Path, text: str) -> None:
    """Writes a small file, which is there whole or not at all."""
    own = place.with_name(f"{place.name}.{os.getpid()}")
    own.write_text(text)
    own.replace(place)


def note_launches(
    rehearsal: Callable[..., None],
    arguments: list[Any],
    capability: int,
    use: Callable[[Callable[[], None]], None],
) -> None:
    """Gives `use` what compiles each kernel that the rehearsal launches, when it does so for the first time.

    From here on this process launches no Triton kernel any more.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    noted = set[Any]()

    def note(*, key, fn, **facts) -> bool:
        def compiled(kernel=fn.jit_function, data=facts["compile"]["specialization_data"]) -> None:
            knobs.runtime.jit_cache_hook = None
            _build_launcher(kernel.preload(data))

        if (which := (fn.module, fn.name, key)) not in noted:
            noted.add(which)
            use(compiled)
        return True  # as if it had been compiled: then nothing is launched

    driver.set_active(NoDevice(capability))
    knobs.runtime.jit_cache_hook = note
    fusible.meta_stands_for_a_gpu = True
    with torch.autograd.set_multithreading_enabled(False):  # there are no threads for the meta device
        rehearsal(*arguments)


class _Unimported(ModuleType):
    """A module of which so much is there already; whoever asks for more gets it from the module itself."""

    def __init__(self, name: str, whole: Callable[[], ModuleType], **known: Any) -> None:
        """`whole` imports it."""
        super().__init__(name)
        self.__spec__ = importlib.util.find_spec(name)
        if self.__spec__ is not None and self.__spec__.submodule_search_locations is not None:
            self.__path__ = self.__spec__.submodule_search_locations
        vars(self).update(known, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(self._whole(), name)


def trace_nothing() -> None:
    """Spares this process PyTorch's compiler, which takes longer to import than a rehearsal takes.

    On the meta device PyTorch asks it to leave functions of its own alone, no more.
    """
    name = "torch._dynamo"
    if name not in sys.modules:
        torch._dynamo = sys.modules[name] = _Unimported(
            name, lambda: importlib.import_module("torch._dynamo"), disable=lambda function, *_, **__: function
        )


class NoDevice:
    """What Triton asks its driver when it compiles, without a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def _build_launcher(kernel: Any) -> None:
    """The C function that passes the arguments of a kernel on, which Triton builds at the first launch, by gcc."""
    with contextlib.suppress(Exception):  # without the driver's library none can be linked
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)


def _build_driver() -> None:
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()


class Forks:
    """Does each task in a fork of its own, at most so many at a time, each of which may take so many seconds."""

    def __init__(self, most: int, longest: int) -> None:
        self._most, self._longest = most, longest
        self._running, self._well = 0, True

    def do(self, task: Callable[[], None]) -> None:
        """Begins a task as soon as there is room."""
        if self._running == self._most:
            self._wait()
        if os.fork() == 0:
            status = 1
            try:
                signal.alarm(self._longest)  # a fork has none of its own
                task()
                status = 0
            finally:
                os._exit(status)
        self._running += 1

    def all_well(self) -> bool:
        """Whether all tasks, once they have ended, went well."""
        while self._running:
            self._wait()
        return self._well

    def _wait(self) -> None:
        self._running -= 1
        self._well &= os.wait()[1] == 0
