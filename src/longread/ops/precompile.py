"""Triton kernels compiled side by side, before they are needed.

Triton compiles a kernel when it is first launched, one after the other: half a minute of a process that meets an empty
cache. `precompile` starts a process beside this one, which rehearses the work to come on tensors of the meta device:
they have shapes, types and alignments, which is all that a kernel is compiled for, and no memory. It notes each launch
instead of making it, and then compiles all that was noted on all processors, into Triton's cache on the disk. Whoever
launches a kernel that is not there yet waits for that process.

It only ever fills the cache: what is not rehearsed, or fails, is compiled at its launch as always.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import atexit
import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longread.ops import fusible

LONGEST_WAIT = 120.0
"""Seconds that a launch waits; after them the process is ended, and the launch compiles for itself."""
_CHILD = """
import json, sys
request = json.load(sys.stdin)
sys.path[:] = request["path"]
from {module} import {function}
from longread.ops.precompile import compile_noted
compile_noted({function}, request)
"""
logger = logging.getLogger(__name__)


def precompile(rehearsal: Callable[..., None], *arguments: Any, device: torch.device) -> None:
    """Begins to compile the kernels that `rehearsal(*arguments)` launches, unless that was done before.

    Returns at once. Nothing happens but on an NVIDIA GPU with Triton. Never raises.

    Args:
        rehearsal: a function at the top of a module, which works on the meta device.
        arguments: anything that JSON can hold.
        device: whose kernels.
    """
    if device.type != "cuda" or torch.version.cuda is None or not fusible.triton_is_installed():
        return
    try:
        major, minor = torch.cuda.get_device_capability(device)
        begin(rehearsal, list(arguments), 10 * major + minor)
    except Exception:  # whatever it is, kernels are compiled at their launches
        logger.debug("no kernels are compiled ahead", exc_info=True)


def begin(rehearsal: Callable[..., None], arguments: list[Any], capability: int) -> None:
    """The same for GPUs of a compute capability, 90 for 9.0; raises what it meets."""
    from triton import knobs

    function = rehearsal.__module__, rehearsal.__qualname__
    done = Path(knobs.cache.dir) / f"longread-{_digest([function, arguments, capability])}"
    if done.exists():
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    request = {
        "path": sys.path,
        "arguments": arguments,
        "capability": capability,
        "workers": max(1, len(os.sched_getaffinity(0)) // ranks),
        "done": str(done),
    }
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", "-c", _CHILD.format(module=function[0], function=function[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        text=True,
    )
    with process.stdin as stdin:  # type: ignore[union-attr]
        json.dump(request, stdin)
    atexit.register(process.kill)
    let_launches_wait_for(process)


def _digest(facts: list[Any]) -> str:
    """Of all that decides which kernels there are and how they are compiled: who has another one rehearses again."""
    import triton

    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = [torch.__version__, triton.__version__, hashlib.sha256(b"".join(sources)).hexdigest()]
    return hashlib.sha256(json.dumps([facts, versions]).encode()).hexdigest()


def let_launches_wait_for(process: subprocess.Popen[str]) -> None:
    """What Triton does not find in its cache before the process has ended it looks for once more then."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    before = knobs.cache.manager_class

    class WaitingCacheManager(before or FileCacheManager):  # type: ignore[misc, valid-type]
        def get_group(self, filename: str) -> Any:
            return super().get_group(filename) or (wait() and super().get_group(filename))

        def get_file(self, filename: str) -> Any:
            return super().get_file(filename) or (wait() and super().get_file(filename))

    def wait() -> bool:
        try:
            process.wait(LONGEST_WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
        if knobs.cache.manager_class is WaitingCacheManager:
            knobs.cache.manager_class = before
        return True

    knobs.cache.manager_class = WaitingCacheManager


def settle_names(module: dict[str, Any]) -> None:
    """Makes the names on the disk of a module's kernels, given its globals, the same in every process.

    Triton hashes a function when it is first compiled, with those constants of the module that the functions it calls
    are known to use, that is, if they were hashed before. So all are hashed here, in the order of the file.
    """
    import triton

    for function in list(module.values()):
        if isinstance(function, triton.JITFunction):
            _ = function.cache_key


# The process beside it.


def compile_noted(rehearsal: Callable[..., None], request: dict[str, Any]) -> None:
    """Compiles the kernels of a rehearsal in as many forks as `request` says; notes there that it is done."""
    from triton.runtime.cache import triton_key

    noted = noted_launches(rehearsal, request["arguments"], request["capability"])
    triton_key()  # hashes hundreds of megabytes, once for all forks
    if in_forks([*noted, _build_driver], request["workers"]):
        Path(request["done"]).touch()


def noted_launches(rehearsal: Callable[..., None], arguments: list[Any], capability: int) -> list[Callable[[], None]]:
    """What compiles each kernel that the rehearsal launches, those with most arguments, which take longest, first.

    From here on this process launches no Triton kernel any more.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    noted: dict[Any, tuple[int, Callable[[], None]]] = {}

    def note(*, key, fn, **facts) -> bool:
        def compiled(kernel=fn.jit_function, data=facts["compile"]["specialization_data"]) -> None:
            knobs.runtime.jit_cache_hook = None
            _build_launcher(kernel.preload(data))

        noted.setdefault((fn.module, fn.name, key), (len(facts["compile"]["signature"]), compiled))
        return True  # as if it had been compiled: then nothing is launched

    driver.set_active(NoDevice(capability))
    knobs.runtime.jit_cache_hook = note
    fusible.meta_stands_for_a_gpu = True
    with torch.autograd.set_multithreading_enabled(False):  # there are no threads for the meta device
        rehearsal(*arguments)
    return [compiled for _, compiled in sorted(noted.values(), key=lambda pair: -pair[0])]


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


def in_forks(tasks: list[Callable[[], None]], workers: int) -> bool:
    """Does the tasks in their order, each worker the next one that is left; whether all went well."""
    reading, writing = os.pipe()
    os.write(writing, b"".join(index.to_bytes(2, "little") for index in range(len(tasks))))
    os.close(writing)
    children = []
    for _ in range(min(workers, len(tasks))):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                while taken := os.read(reading, 2):
                    tasks[int.from_bytes(taken, "little")]()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]  # all are waited for, whatever the first says
    return not any(statuses)
