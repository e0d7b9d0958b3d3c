"""The record of a run while it goes on: run.json, the tokenizer, trackers."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longread import files, record
from longread.config import RunConfig
from longread.train.agreement import RUN_FILE
from longread.train.beginning import TOKENIZER_FILES, keep_tokenizer


@contextlib.contextmanager
def recording(
    out: Path,
    config: RunConfig,
    data: Path,
    *,
    begun: Mapping[str, Any],
    step: Callable[[], int],
    trackers: Sequence[str],
) -> Iterator[list[record.Tracker]]:
    """Opens the trackers, then leaves run.json, to which each resumption adds itself, and the tokenizer.

    A run that ends by an error before its first step leaves neither.

    Args:
        data: the directory of the data.
        begun: what a new run.json says besides: `initial` where it is known, and how ranks divide the work.
        step: how many are finished.
        trackers: names from `longread.record.TRACKERS`.
    """
    path, now = out / RUN_FILE, record.describe_run(config, sys.argv)
    ranks = {name: value for name, value in begun.items() if name != "initial"}
    if os.path.exists(path):
        run = files.read_json(path, kind="run")
        run["config"] = now.pop("config")
        run["resumed"] = [*run["resumed"], now | {"step": step()} | ranks]
    else:
        run = {"id": uuid.uuid4().hex[:8], **now, "resumed": [], **begun}
    with contextlib.ExitStack() as stack:
        opened = []
        for name in dict.fromkeys(trackers):
            opened.append(record.open_tracker(name, directory=out, run_id=run["id"], run=run, step=step() + 1))
            stack.callback(opened[-1].close)
        files.write_json_atomically(path, run, kind="run")
        keep_tokenizer(run.get("initial"), data, out)
        try:
            yield opened
        except BaseException:
            if step() == 0 and not run["resumed"]:  # nothing to go on with: the place is free again
                for name in (RUN_FILE, *TOKENIZER_FILES):
                    (out / name).unlink(missing_ok=True)
            raise
