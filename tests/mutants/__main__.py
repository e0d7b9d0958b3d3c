"""`python -m tests.mutants`: puts every fault into a tree, one at a time, and writes down which the tests notice."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import tomllib
from pathlib import Path

from .reasons import known_reasons
from .run import Run

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to put faults into (default: this one)")
    parser.add_argument("--commit", default="", help="what the results call the tree (default: what Git calls it)")
    parser.add_argument("--targets", type=Path, default=HERE / "targets.toml", help="source files and their tests")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.json", help="results; read if it exists")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="forks at a time")
    parser.add_argument("--minutes", type=float, default=24 * 60, help="stop then; the same command goes on")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th fault, from the I-th on")
    parser.add_argument("--only", default="", help="only files whose path holds this")
    parser.add_argument("--tests", default="", metavar="A,B", help="only test files whose path holds one of these")
    parser.add_argument(
        "--since", type=Path, nargs="+", default=[], metavar="JSON", help="earlier results to take over"
    )
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of tests for one fault")
    parser.add_argument("--again", action="store_true", help="judge anew what survived the tests of a smaller budget")
    options = parser.parse_args()
    deadline = time.time() + options.minutes * 60
    os.environ.update(CUDA_VISIBLE_DEVICES="", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    for name in tomllib.loads(options.targets.read_text())["preload"]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name} cannot be imported, and tests that need it count for nothing: {error}")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    shard, shards = map(int, options.shard.split("/"))
    run = Run(options.tree.resolve(), options.targets, options.out, options.budget, options.commit, options.tests)
    for earlier in options.since:
        run.take(json.loads(earlier.read_text()), known_reasons())
    finished = run.go(options.only, (shard, shards), options.again, options.jobs, deadline)
    run.show()
    if not finished:
        print(f"The time is over. The same command goes on from {options.out}.")


if __name__ == "__main__":
    main()
