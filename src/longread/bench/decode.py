"""The time of writing after a context, token by token through a `Session`, as `longread generate` does it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from longread.bench.cases import Case
from longread.bench.gate import GateFailed, refusing_fallbacks, relative
from longread.bench.machine import free_memory, peak_gib, precision_on, seconds
from longread.bench.prefill import INNER, LOGITS_OFF, reading_model
from longread.bench.profile import profiled
from longread.bench.rows import Row, make_row
from longread.inner_loop import next_token_logits, read
from longread.model import Transformer
from longread.session import Session

LEAST_WRITTEN = 256
"""Tokens of one measurement, or a whole mini-batch if that is longer: then one inner step, as in the long run."""
LONGEST_CHECKED = 16_384
"""Tokens of context after which writing is compared with reading; a cache beyond that leaves no room for a second."""
WARMING, PROFILED = 8, 16


def measure_decode(case: Case, device: torch.device, *, repeats: int, profile: bool = False) -> tuple[Row, str | None]:
    """Tokens per second of greedy writing after `case.context` tokens really read; a profile, if wanted.

    Raises:
        GateFailed: what was written gives other logits than the same tokens read.
        torch.OutOfMemoryError: it does not fit.
    """
    free_memory(device)
    model = reading_model(case, device)
    count = max(LEAST_WRITTEN, model.config.mini_batch_size)
    with refusing_fallbacks():
        short = _session(model, min(case.context, LONGEST_CHECKED))
        check_writing(short, count)
        session = short if case.context <= LONGEST_CHECKED else None
        del short
        free_memory(device)
        session = session or _session(model, case.context)
        write(session.fork(), WARMING)
    free_memory(device)
    times = [seconds(device, lambda: write(session.fork(), count)) for _ in range(repeats)]
    row = make_row(case, [count / s for s in times], peak_gib(device), device)
    if not profile:
        return row, None
    few = min(count, PROFILED)
    writing = session.fork().generate(WARMING + 2 * few, temperature=0.0)

    def work() -> None:
        list(itertools.islice(writing, few))

    list(itertools.islice(writing, WARMING))
    return row, profiled(device, work, 1e3 * seconds(device, work))


def write(session: Session, count: int) -> list[int]:
    """Greedy tokens."""
    written: Iterator[int] = session.generate(count, temperature=0.0)
    return list(written)


def check_writing(session: Session, count: int) -> None:
    """Raises `GateFailed` unless a fork that writes ends with the logits of one that reads what was written."""
    model, tolerance = session.model, LOGITS_OFF[precision_on(session.model.device)]
    writer = session.fork()
    tokens = torch.tensor([write(writer, count)], device=model.device)
    expected = next_token_logits(model, read(model, session.state, tokens, inner=session.inner).state)
    difference = relative(next_token_logits(model, writer.state), expected)
    if not difference <= tolerance:
        raise GateFailed(
            f"after writing {count} tokens logits are {difference:.2g} off those of reading them, allowed {tolerance:g}"
        )


def _session(model: Transformer, tokens: int) -> Session:
    session = Session(model, INNER)
    session.read(torch.randint(model.config.vocab_size, (tokens,)))
    return session
