"""Tokens per second that an engine writes, against the number of sessions: each with its own fast weights and window.

    python -m benchmarks.gpu_serving [--size 3b] [--sessions 1 2 4 8 16 24] [--full-sessions 1 2] [--out FILE]

First the gate: sessions that write together must give the logits that each gives when its text is read alone. Then
each number of sessions writes greedily through `longread.engine.Engine`, and full attention with a cache of 128K tokens
does beside it. Keys, values and weights are drawn: the time does not depend on them. The floor is the time of reading
every byte of slow weights, fast weights and keys and values once a round, at the speed of copying measured in this run.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from longread.bench.machine import free_memory, measure_machine, peak_gib, precision_on, versions
from longread.config import InnerConfig
from longread.engine import Engine, Limits, Sampling, Task, Token
from longread.inner_loop import ReadingState, begin, read
from longread.inner_loop.places import Places
from longread.model import Past, Transformer, find_device, initialize
from longread.recipes import recipe

INNER = InnerConfig()
FULL_CONTEXT = 131_072
LOGITS_OFF = {"bfloat16": 0.1, "float32": 1e-3}
"""L2 difference of the logits as a share of their norm."""


@dataclass
class Row:
    """One number of sessions."""

    method: str
    context: int
    sessions: int
    tokens: int
    """That each session wrote; with more than a mini-batch, an inner step each is in the time."""
    per_second: list[float]
    """Of all sessions together, in each repetition."""
    floor_ms: float
    peak_gib: float | None

    @property
    def median(self) -> float:
        """Tokens per second."""
        return statistics.median(self.per_second)


def drawn_model(size: str, method: str, device: torch.device) -> Transformer:
    """A model of one of the paper's shapes, or the toy."""
    with device:
        model = Transformer(recipe(size, method=method).model)
    initialize(model, seed=0)
    return model.to(getattr(torch, precision_on(device))).requires_grad_(False)


def drawn_state(model: Transformer, position: int) -> ReadingState:
    """The state at `position`, a multiple of M, with drawn keys and values."""
    empty, config = begin(model), model.config
    tokens = [min(position, config.window_of(i) or position) for i in range(config.num_blocks)]
    like = empty.hidden.new_empty(0)

    def drawn(count: int) -> Past:
        shape = 1, config.num_heads, count, config.head_dim
        return Past(*(like.new_empty(shape).normal_() for _ in range(2)))

    pasts = tuple(drawn(count) for count in tokens)
    split = model.num_lower_attentions
    output = like.new_empty(1, config.width).normal_()
    changes = {"lower_pasts": pasts[:split], "upper_pasts": pasts[split:], "output": output}
    return ReadingState(**{**vars(empty), "position": position, **changes})


def gate(model: Transformer, sessions: int = 5) -> float:
    """The worst difference between logits of lanes and those of reading alone; exits where it is out of tolerance."""
    M, V = model.config.mini_batch_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(V, (sessions, M + 9), generator=generator).to(model.device)
    places = Places(model, sessions, learn=True)
    states = []
    for lane in range(sessions):
        begun = 1 + lane * (M // sessions)
        states.append(read(model, begin(model), texts[lane : lane + 1, :begun], inner=INNER).state)
        places.put(lane, states[-1], learn=True)
    worst = 0.0
    for step in range(8):
        tokens = texts[:, step]
        for lane in range(sessions):
            if places.due(lane):
                places.step(lane, tokens[lane : lane + 1], INNER)
        places.read(tokens)
        for lane in range(sessions):
            states[lane] = read(model, states[lane], tokens[lane].view(1, 1), inner=INNER).state
            expected = model.logits(states[lane].output)[0]
            worst = max(worst, ((places.logits(sessions)[lane] - expected).norm() / expected.norm()).item())
    limit = LOGITS_OFF[precision_on(model.device)]
    if not worst <= limit:
        raise SystemExit(f"no speed on red: logits of sessions in a batch are {worst:.2g} off, allowed {limit}")
    return worst


def floor_seconds(model: Transformer, state: ReadingState, sessions: int, bandwidth: float) -> float:
    """Of one round: a token of each session."""
    embedding = 0 if model.config.tie_embeddings else model.embedding.weight.nbytes
    fast = model.config.num_fast_weights * model.dtype.itemsize
    slow = sum(p.nbytes for p in model.parameters()) - embedding - fast
    own = fast + sum(x.nbytes for past in (*state.lower_pasts, *state.upper_pasts) for x in past)
    return (slow + sessions * own) / bandwidth


def measure(
    model: Transformer, method: str, context: int, sessions: int, tokens: int, repeats: int, bandwidth: float
) -> Row:
    """Lets so many sessions write; raises `torch.OutOfMemoryError` where they do not fit."""
    free_memory(model.device)
    state = [drawn_state(model, context)]
    floor = floor_seconds(model, state[0], sessions, bandwidth)
    speeds = writing_speeds(model, state, sessions, tokens, repeats)
    gc.collect()
    return Row(method, context, sessions, tokens, speeds, 1e3 * floor, peak_gib(model.device))


def writing_speeds(
    model: Transformer, states: list[ReadingState], sessions: int, tokens: int, repeats: int
) -> list[float]:
    """Tokens per second of all sessions, which begin with the one state and go on; the list is emptied."""
    speeds = []
    with Engine(model, INNER, limits=Limits(max_batch=sessions), fingerprint="benchmark") as engine:
        jobs, command = engine._jobs, engine._scheduler.command
        command(lambda: jobs.lanes.resize(sessions)).result()
        ids = [engine.create().id for _ in range(sessions)]

        def plant() -> None:
            for session in ids:
                reader = jobs.readers[session]
                reader.rest(states[0])
                reader.position, reader.tier = states[0].position, "device"
            states.clear()

        command(plant).result()
        for repeat in range(repeats + 1):
            # the first round, as long as the others, compiles and captures: inner steps too
            tasks = [engine.generate(session, Sampling(max_tokens=tokens, temperature=0)) for session in ids]
            times = [note_tokens(task) for task in tasks]
            for task in tasks:
                task.result()
            if repeat:
                speeds.append(speed_together(times))
    return speeds


class TakingTurns(Exception):
    """There was no room for all sessions to write at once."""


def note_tokens(task: Task) -> list[float]:
    """The list to which the time of each token of a task is appended."""
    times: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, Token):
            times.append(time.perf_counter())

    task.subscribe(note)
    return times


def speed_together(times: list[list[float]]) -> float:
    """Tokens per second while all sessions write: moving into lanes and out of them is not writing.

    Raises `TakingTurns` if they never did.
    """
    begun, ended = max(own[0] for own in times), min(own[-1] for own in times)
    if ended <= begun:
        raise TakingTurns("they take turns, for want of memory")
    return sum(sum(begun < at <= ended for at in own) for own in times) / (ended - begun)


def sweep(
    model: Transformer, method: str, context: int, counts: Iterable[int], tokens: int, repeats: int, bandwidth: float
) -> list[Row]:
    """More and more sessions, until they do not fit."""
    rows = []
    for sessions in counts:
        try:
            rows.append(measure(model, method, context, sessions, tokens, repeats, bandwidth))
        except (torch.OutOfMemoryError, TakingTurns) as error:
            print(f"{method}: {sessions} sessions do not fit: {str(error)[:100]}", flush=True)
            break
        print(cells(rows[-1]), flush=True)  # a run that is stopped has said what it found
    return rows


def table(rows: list[Row]) -> str:
    """As Markdown."""
    names = ("context", "sessions", "tokens each", "tokens/s together", "range", "a session", "ms a round", "× floor")
    names = (*names, "peak GiB")
    lines = [f"| method | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    return "\n".join([*lines, *map(cells, rows)])


def cells(row: Row) -> str:
    """A line of the table."""
    ms = 1e3 * row.sessions / row.median
    spread = f"{min(row.per_second):,.0f}–{max(row.per_second):,.0f}"
    return (
        f"| {row.method} | {row.context:,} | {row.sessions} | {row.tokens} | {row.median:,.0f} | {spread} "
        f"| {row.median / row.sessions:,.0f} | {ms:.2f} | {ms / row.floor_ms:.2f} | {row.peak_gib} |"
    )


def main() -> None:
    """Prints the page and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 2, 4, 8, 16, 24])
    parser.add_argument("--full-sessions", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--full-context", type=int, default=FULL_CONTEXT)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--step-sessions", type=int, nargs="*", default=[1, 8], help="also write a whole mini-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = find_device(options.device)
    machine = measure_machine(device)
    model = drawn_model(options.size, "e2e", device)
    worst = gate(model)
    context = 2 * max(model.config.window_size, model.config.mini_batch_size)
    rows = sweep(model, "e2e", context, options.sessions, options.tokens, options.repeats, machine.bandwidth)
    whole = model.config.mini_batch_size + 1
    rows += sweep(model, "e2e", context, options.step_sessions, whole, options.repeats, machine.bandwidth)
    del model
    free_memory(device)
    if options.full_sessions:
        model = drawn_model(options.size, "full", device)
        rows += sweep(
            model,
            "full",
            options.full_context,
            options.full_sessions,
            options.tokens,
            options.repeats,
            machine.bandwidth,
        )
    page = f"""# Writing with many sessions, {options.size}, {date.today()}

`{shlex.join(["python", "-m", "benchmarks.gpu_serving", *sys.argv[1:]])}`

{json.dumps(versions(device))}; {machine.name}, copying {machine.bandwidth / 1e9:.0f} GB/s.
Gate: logits of sessions in a batch are at most {worst:.2g} off those of reading alone.

{table(rows)}

"tokens each" above a mini-batch has one inner step of every session in its time. One session at a time is the first
row. Medians of {options.repeats} runs.
"""
    print(page)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
