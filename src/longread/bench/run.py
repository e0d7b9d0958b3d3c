"""One case after the other: its gate, its measurement, its rows; what fails is a line and not the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from longread.bench.cases import LONGEST_CACHE, Case
from longread.bench.cold import measure_first_read, measure_first_token
from longread.bench.decode import measure_decode
from longread.bench.gate import GateFailed, GateResult, check_gradients, check_scores
from longread.bench.machine import Machine, free_memory, measure_machine
from longread.bench.parallel import measure_parallel
from longread.bench.prefill import measure_prefill
from longread.bench.rows import Row
from longread.bench.training import measure_first_step, measure_training
from longread.config import UserError

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """All that a run of cases found."""

    machine: Machine | None = None
    rows: list[Row] = field(default_factory=list)
    verdicts: list[GateResult] = field(default_factory=list)
    failures: list[tuple[Case, str]] = field(default_factory=list)
    red: bool = False
    """Whether a gate was, so that a time is missing; the command's exit status says it."""
    profiles: dict[Case, str] = field(default_factory=dict)


def run_cases(
    cases: Sequence[Case],
    device: torch.device,
    *,
    repeats: int,
    profile: bool = False,
    say: Callable[[str], None] = lambda line: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Outcome:
    """Measures the cases, each after its gate.

    Args:
        repeats: times that each is measured after its first time.
        profile: also tell where the time goes.
        say: is told what happens, line by line.
        on_row: is given each row as soon as there is one.
    """
    machine = measure_machine(device)
    outcome = Outcome(machine)
    passed: dict[tuple[str, str, int], bool] = {}
    for case in cases:
        if not case.fits_cache:
            outcome.failures.append((case, f"not measured, its cache ends at {LONGEST_CACHE:,} tokens"))
            continue
        try:
            if not _gate(case, device, passed, outcome, say):
                raise GateFailed("its gate is red")
            row = _measure(case, device, repeats, profile, outcome)
        except torch.OutOfMemoryError:
            outcome.failures.append((case, "does not fit into memory"))
        except GateFailed as error:
            outcome.red = True
            outcome.failures.append((case, f"RED, no time taken: {error}"))
        except UserError:
            raise
        except Exception as error:  # the cases after it, and the rows before it, are worth more than a traceback
            logger.warning("%s failed", case, exc_info=True)
            outcome.red = True
            outcome.failures.append((case, f"failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        else:
            outcome.rows.append(row)
            on_row(row)
            say(f"{case}: {row['value']:g} {row['unit']}, peak {row['peak_gib']} GiB")
            continue
        say(f"{case}: {outcome.failures[-1][1]}")
        free_memory(device)
    free_memory(device)
    outcome.machine = machine.or_better(measure_machine(device))
    return outcome


def _gate(
    case: Case,
    device: torch.device,
    passed: dict[tuple[str, str, int], bool],
    outcome: Outcome,
    say: Callable[[str], None],
) -> bool:
    """Whether what the case times is right on a small network; asked once for each kind of network."""
    training = case.work in ("train", "first-step")
    key = "training" if training else "reading", case.method, case.network.head_dim
    if key not in passed:
        verdict = (check_gradients if training else check_scores)(*key[1:], device)
        outcome.verdicts.append(verdict)
        say(f"gate, {verdict}")
        passed[key] = verdict.passed
    return passed[key]


def _measure(case: Case, device: torch.device, repeats: int, profile: bool, outcome: Outcome) -> Row:
    text = None
    if case.gpus > 1:
        row, verdict = measure_parallel(case, device, repeats=repeats)
        outcome.verdicts.append(verdict)
    elif case.work == "train":
        row, text = measure_training(case, device, repeats=repeats, profile=profile)
    elif case.work == "first-step":
        row = measure_first_step(case, device)
    elif case.work == "first-read":
        row = measure_first_read(case, device)
    elif case.work == "first-token":
        row = measure_first_token(case, device)
    elif case.work == "prefill":
        row, text = measure_prefill(case, device, repeats=repeats, profile=profile)
    else:
        row, text = measure_decode(case, device, repeats=repeats, profile=profile)
    if text is not None:
        outcome.profiles[case] = text
    return row
