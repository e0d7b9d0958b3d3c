"""The command line. A command is a module of its name, imported where it is asked for, or for the help of all.

Heavy imports happen when a command runs, so that --help is instant.

    longread demo | prepare | train | read | generate | evaluate | needle | questions | judge | convert | bench |
             serve | estimate | think

Wrong input ends with one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from longread import __version__
from longread.cli.arguments import settle_model
from longread.config import UserError

COMMANDS = (
    *("demo", "prepare", "train", "read", "generate", "evaluate", "needle", "questions", "judge", "convert"),
    *("bench", "serve", "estimate", "think"),
)


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line, or of the one command that was asked for."""
    parser = argparse.ArgumentParser(
        prog="longread", description="Language models that keep learning while they read (TTT-E2E, arXiv 2512.23675)."
    )
    parser.add_argument("--version", action="version", version=f"longread {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in (only,) if only in COMMANDS else COMMANDS:
        command = importlib.import_module(f"longread.cli.{name}")
        summary, _, example = (command.__doc__ or "").partition("\n\n")
        added = commands.add_parser(
            name,
            help=summary.rstrip("."),
            description=summary,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(added)
        added.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0; 2 for wrong input and for what needs more memory than there is; 3 for a run that diverged; 130 on SIGINT, 143 for
    training that SIGTERM has stopped and 129 for one that SIGHUP has.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve beside any other busy process
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser(given[0] if given else None).parse_args(given)
    options.arguments = given
    warnings.showwarning = _show_warning
    logging.basicConfig(format="longread: %(message)s", stream=sys.stderr)
    if not _is_first():  # rank 0 speaks for all
        logging.getLogger().handlers[0].setLevel(logging.ERROR)
    settle_model(options)
    try:
        import_torch(getattr(options, "device", "cpu"))
        return int(options.run(options))
    except UserError as error:
        if not getattr(error, "is_said_elsewhere", False):
            said = str(error).removeprefix(_rank().replace(":", ""))
            print(f"longread: error: {_rank()}{said}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return int(getattr(error, "exit_status", 2))
    except KeyboardInterrupt as stop:
        return int(getattr(stop, "exit_status", 130))
    except (MemoryError, RuntimeError) as error:
        from longread.model import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"longread: error: out of memory: {_OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone: nothing left to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def import_torch(device: str = "cpu") -> None:
    """Imports PyTorch, if that is still to be done, looks for no garbage meanwhile, and opens the GPU beside it.

    Looking takes a sixth of the time. What is imported stays, so no later collection looks at it either.

    Args:
        device: as `longread.loading.open_model` takes it; "cpu" opens none.
    """
    if "torch" in sys.modules:
        return
    name, _, index = device.partition(":")
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # ranks choose theirs later
    if name in ("auto", "cuda") and alone and _torch_is_for_nvidia():
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # older drivers load all kernels otherwise
        # no daemon: a process must not end amid a call of the driver
        threading.Thread(target=_open_gpu, args=(index or "0",), name="open GPU").start()
    looked = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if looked:
            gc.enable()
    gc.freeze()


def _torch_is_for_nvidia() -> bool:
    """Whether the PyTorch that is installed, and not imported yet, can use what is opened."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    with contextlib.suppress(OSError):
        said = Path(found.origin).with_name("version.py").read_text()
        return bool(re.search(r"^cuda\b.*= *['\"]", said, re.MULTILINE))
    return False


def _open_gpu(index: str) -> None:
    """Starts the driver and the context of a GPU, which PyTorch takes over; what fails here PyTorch will say."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), int(index)) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


_OUT_OF_MEMORY = (
    "a smaller batch (train: --set micro_batch_size=N), a shorter text or context or a smaller model needs less; "
    "`longread estimate` says how much"
)


def _is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def _rank() -> str:
    """Which of several processes of `torchrun` speaks; nothing where there is one."""
    return f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if not _is_first():
        return
    with contextlib.suppress(OSError):  # nobody reads it, which is no reason to end
        print(f"longread: warning: {message}", file=sys.stderr)
