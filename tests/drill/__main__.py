"""`python -m tests.drill`: every fault, what was said, and whether the run became the one that met none."""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from longread.record import code_commit, hardware
from tests.drill.faults import Fault, faults
from tests.drill.judging import Wrong
from tests.drill.launching import Hangs
from tests.drill.report import page
from tests.drill.run import EVERY, STEPS, Drill


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of ranks and places (default 1)")
    parser.add_argument("--by", choices=("forks", "torchrun"), help="only faults of ranks that are started so")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only faults whose names match")
    parser.add_argument("--directory", type=Path, help="for runs (default: one that is deleted)")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--page", type=Path, help="and a page here")
    options = parser.parse_args(arguments)
    began = time.time()
    with tempfile.TemporaryDirectory() as directory:
        drill = Drill(options.directory or Path(directory))
        rng = random.Random(options.seed)
        rows, wrong = [], 0
        for number, fault in enumerate(faults(rng, drill.counts), 1):
            draws = random.Random(rng.random())
            if (options.by and fault.by != options.by) or not re.search(options.only, fault.name):
                continue
            row = _meet(drill, fault, draws)
            wrong += "wrong" in row
            rows.append({"number": number, **row})
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    found = {
        "command": f"python -m tests.drill --seed {options.seed}",
        "commit": code_commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "hardware": hardware(),
        "steps": STEPS,
        "every": EVERY,
        "seconds": round(time.time() - began),
        "faults": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if options.page:
        options.page.write_text(page(found))
    print(f"{len(rows)} faults, {wrong} of them not survived")
    return int(wrong > 0)


def _meet(drill: Drill, fault: Fault, draws: random.Random) -> dict[str, object]:
    began = time.monotonic()
    row: dict[str, object] = {"fault": fault.name, "by": fault.by, "again": fault.again, "ranks": 2}
    try:
        row |= drill.meet(fault, draws)
    except (Wrong, Hangs) as problem:
        row |= {"where": fault.where, "wrong": str(problem)}
    return row | {"seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    sys.exit(main())
