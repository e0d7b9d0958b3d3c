"""The first tokens that a fresh process reads or writes, with compiled kernels on the disk and with none."""

from __future__ import annotations

import inspect
import itertools
import json
import subprocess
import sys
import time

import torch

from longread.bench.cases import Case
from longread.bench.gate import refusing_fallbacks
from longread.bench.machine import free_memory, peak_gib, seconds
from longread.bench.prefill import COMPARED, INNER, check_text, reading_model
from longread.bench.process import empty_caches, in_a_process
from longread.bench.rows import Row, make_row
from longread.inner_loop import precompile_reading
from longread.loading import find_model, open_tokenizer
from longread.session import Session
from longread.tokenizer import Tokenizer

_UNTIL_WRITING = """
import json, sys, time
began, path, device, threads, text = json.load(sys.stdin)
from longread.cli import import_torch
import_torch(device)
import torch
from longread import open_model
torch.set_num_threads(threads)
times = [began, time.time()]
def done():
    torch.cuda.synchronize() if opened.model.device.type == "cuda" else None
    times.append(time.time())
opened = open_model(path, device)
done()
session = opened.session()
session.read(text)
done()
next(iter(session.generate(1, temperature=0.0)))
done()
print(json.dumps(times))
"""


def measure_first_read(case: Case, device: torch.device) -> Row:
    """Seconds of the first `case.context` tokens that a process reads, and of as many after them.

    First in a process that finds no compiled kernel, then in one that finds those on the disk. Before the clock starts
    Python, PyTorch and the device are up, the weights drawn and, on a GPU, the compilation of kernels begun, as
    `open_model` begins it.

    Raises:
        GateFailed: the text is scored differently than mini-batch by mini-batch.
        torch.OutOfMemoryError: it does not fit.
    """
    free_memory(device)
    with empty_caches():
        (cold, cold_next, _), (first, then, peak) = (in_a_process(_first_read, case, str(device)) for _ in range(2))
    parts = {"first": first, "next": then, "first, nothing compiled": cold, "next, nothing compiled": cold_next}
    return make_row(case, [first], peak, device, parts=parts)


def _first_read(case: Case, device_name: str) -> tuple[float, float, float | None]:
    device = torch.device(device_name)
    free_memory(device)
    model = reading_model(case, device)
    precompile_reading(model, INNER)
    text = torch.randint(case.network.vocab_size, (2 * case.context + 1,), device=device)
    session = Session(model, INNER)
    with refusing_fallbacks():
        first = seconds(device, lambda: session.read(text[: case.context + 1]))
        then = seconds(device, lambda: session.read(text[case.context + 1 :]))
    peak = peak_gib(device)
    check_text(case, model, text[None, : COMPARED * model.config.mini_batch_size + 1])
    return first, then, peak


def measure_first_token(case: Case, device: torch.device) -> Row:
    """Seconds from the start of a process to the first token that it writes after a prompt, by what it does until then.

    The process does what `longread generate` does. The prompt is Python source, about as many tokens as the case says:
    over tokens that are drawn learning can go astray, and then they are read again. Kernels are on the disk but in the
    process before, of which the whole is told too. Raises `UserError` if there is no such model.
    """
    free_memory(device)
    path, text = str(find_model(case.size)), _text(open_tokenizer(case.size), case.context)
    with empty_caches():
        cold, parts = (_until_the_first_token(path, text, device) for _ in range(2))
    total = sum(parts.values())
    return make_row(case, [total], None, device, parts=parts | {"all, nothing compiled": sum(cold.values())})


def _text(tokenizer: Tokenizer, tokens: int) -> str:
    """The source of Python's module `inspect`, over again where it is short."""
    ids = tokenizer.encode(inspect.getsource(inspect))
    return tokenizer.decode((ids * (tokens // len(ids) + 1))[:tokens])


def _until_the_first_token(path: str, text: str, device: torch.device) -> dict[str, float]:
    request = json.dumps([time.time(), path, str(device), torch.get_num_threads(), text])
    command = [sys.executable, "-c", _UNTIL_WRITING]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["a process ended without a word"])[-1])
    times: list[float] = json.loads(done.stdout)
    spans = (after - before for before, after in itertools.pairwise(times))
    return dict(zip(("import", "open", "read", "write"), spans, strict=True))
