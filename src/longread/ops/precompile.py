"""Triton kernels compiled side by side, before they are needed.

Triton compiles a kernel when it is first launched, one after the other: half a minute of a process that meets an empty
cache. `precompile` starts a process beside this one, which rehearses the work to come on tensors of the meta device:
they have shapes, types and alignments, which is all that a kernel is compiled for, and no memory. Instead of launching
a kernel it leaves it to a fork that compiles it into Triton's cache on the disk. Whoever launches a kernel that is not
there yet waits until it is, or that process has ended.

It only ever fills the cache: what is not rehearsed, or fails, is compiled at its launch as always.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import atexit
import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longread.ops import fusible

LONGEST = 30
"""Seconds that the process and each of its forks have; after them every launch compiles for itself."""
FEWEST_PROCESSORS = 4
"""With less of them a rehearsal takes as long as what it saves."""
LOOK_EVERY = 0.01
"""Seconds."""
_CHILD = """
import json, sys
request = json.load(sys.stdin)
sys.path[:] = request["path"]
from {module} import {function}
from longread.ops.compiling import compile_noted
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

    workers = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    function, cache = (rehearsal.__module__, rehearsal.__qualname__), Path(knobs.cache.dir)
    done = cache / f"longread-{_digest([function, arguments, capability])}"
    key = cache / f"longread-triton-{_state_of_triton()}"
    if key.exists():
        _take_key(key)
    if workers < FEWEST_PROCESSORS or knobs.compilation.always_compile or done.exists():
        return
    cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):
        return
    request = {
        "path": sys.path,
        "arguments": arguments,
        "capability": capability,
        "workers": workers,
        "longest": LONGEST,
        "done": str(done),
        "key": str(key),
    }
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", "-c", _CHILD.format(module=function[0], function=function[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        process_group=0,  # with its forks
    )
    with process.stdin as stdin:  # type: ignore[union-attr]
        json.dump(request, stdin)
    threading.Thread(target=process.wait, name="precompile", daemon=True).start()  # so that it leaves no zombie
    atexit.register(_end, process, os.getpid())
    let_launches_wait_for(process)


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() == owner and process.returncode is None:  # not in a fork of the owner
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _digest(facts: list[Any]) -> str:
    """Of all that decides which kernels there are and how they are compiled: who has another one rehearses again."""
    import triton

    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = [torch.__version__, triton.__version__, hashlib.sha256(b"".join(sources)).hexdigest()]
    return hashlib.sha256(json.dumps([facts, versions]).encode()).hexdigest()


def _state_of_triton() -> str:
    """Which files of Triton `triton_key` hashes, of which sizes and times."""
    import triton

    root = Path(triton.__file__).parent
    sources = [path for name in ("compiler", "backends", "language") for path in (root / name).rglob("*.py")]
    files = sorted([root / "runtime" / "cache.py", *(root / "_C").glob("libtriton.*"), *sources])
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _take_key(place: Path) -> None:
    """Spares this process hashing all of Triton, 0.4 GB, before its first kernel: the process beside one kept it."""
    from triton.runtime import cache

    key = place.read_text()
    cache.triton_key = lambda: key


def let_launches_wait_for(process: subprocess.Popen[str]) -> None:
    """What Triton does not find in its cache it looks for until it is there, or the process has ended."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    before, owner, latest = knobs.cache.manager_class, os.getpid(), time.monotonic() + LONGEST

    class WaitingCacheManager(before or FileCacheManager):  # type: ignore[misc, valid-type]
        def get_group(self, filename: str) -> Any:
            return awaited(super().get_group, filename)

        def get_file(self, filename: str) -> Any:
            return awaited(super().get_file, filename)

    def awaited(look: Callable[[str], Any], filename: str) -> Any:
        while not (found := look(filename)):
            if ended():
                if knobs.cache.manager_class is WaitingCacheManager:
                    knobs.cache.manager_class = before
                return look(filename)
            time.sleep(LOOK_EVERY)
        return found

    def ended() -> bool:
        # a fork of this process, where nobody waits for it, is not to wait either
        return os.getpid() != owner or process.poll() is not None or time.monotonic() > latest

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
