"""How fast, in how much memory, and how far from what the machine gives: right first, then timed.

cases     what is measured, and what of it makes sense
gate      small networks against float64, in the timed precision
training  a step of `longread train`, and the first one of a process
parallel  a step on several GPUs, beside the same load on one
ranks     what one of several processes measures
prefill   reading a context
decode    writing after a context
cold      the first tokens that a process reads or writes
process   a fresh one, and empty caches
profile   where the time goes
machine   the device's best, its clock, its memory
rows      the figures, and the file that collects them
run       one case after the other
report    the page
plots     the plots
"""

from __future__ import annotations

from longread.bench.cases import Case, plan
from longread.bench.machine import Machine
from longread.bench.plots import save_bench_plots
from longread.bench.report import markdown
from longread.bench.rows import merged, read_rows, write_rows
from longread.bench.run import Outcome, run_cases

__all__ = [
    "Case",
    "Machine",
    "Outcome",
    "markdown",
    "merged",
    "plan",
    "read_rows",
    "run_cases",
    "save_bench_plots",
    "write_rows",
]
