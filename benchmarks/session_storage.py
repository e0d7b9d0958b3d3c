"""What rounding a saved session loses: the loss of a text's second half, after saving and restoring at its middle.

    python -m benchmarks.session_storage runs/e2e --data runs/data/validation [--out benchmarks/results]

First the gate: a session saved exactly scores every token, bit for bit on a CPU, as if never saved. Then each
held-out document is read to a position, saved in every storage and restored, and goes on for `--ahead` tokens,
learning. Beside it stands what all of the session is worth there: the loss of a reader that begins at that position.
Differences are paired by document, intervals 95 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np
import torch

from longread.config import UserError
from longread.data import TokenDataset
from longread.evaluate.estimate import ratio
from longread.loading import OpenModel, open_model
from longread.model import find_device
from longread.record import hardware
from longread.session import STORAGES, Session


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="prepared token shards, held out")
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--ahead", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="write the page into this folder")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    try:
        page = run(options)
    except UserError as error:
        print(f"session_storage: error: {error}", file=sys.stderr)
        return 2
    print(page)
    if options.out:
        gpu = find_device(options.device).type == "cuda"
        device = torch.cuda.get_device_name().split()[-1].lower() if gpu else f"cpu-{torch.get_num_threads()}-threads"
        (options.out / f"session-storage_{device}_{date.today()}.md").write_text(page + "\n", encoding="utf-8")
    return 0


def run(options: argparse.Namespace) -> str:
    """Measures, and renders the page."""
    opened = open_model(options.model, options.device)
    data = TokenDataset.open(Path(options.data))
    if data.tokenizer_fingerprint != opened.tokenizer.fingerprint:
        raise UserError(f"{options.data} was prepared with another tokenizer than that of the model; prepare it anew")
    about = f"`{opened.name}`, {options.ahead} tokens read after restoring. {json.dumps(hardware())}"
    lines = [
        f"# What rounding a saved session loses, {date.today()}",
        "",
        f"{about}; torch {torch.__version__}.",
        "",
        "Gate: a session saved exactly goes on, bit for bit, as one that was never saved.",
        "",
        "| position | storage | MiB | nats per token | more than exact | documents |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for position in options.positions:
        losses, sizes = measure(opened, data, position, options)
        if not losses:
            continue
        exact, count = np.array(losses["exact"]), np.full(len(losses["exact"]), float(options.ahead))
        for name, sums in losses.items():
            size = f"{sizes[name] / 2**20:.3f}" if name in sizes else ""
            more = "" if name == "exact" else with_digits(np.array(sums) - exact, count)
            mean = ratio(np.array(sums), count)
            lines.append(f"| {position:,} | {name} | {size} | {mean} | {more} | {len(exact)} |")
    return "\n".join(lines)


def with_digits(differences: np.ndarray, count: np.ndarray) -> str:
    """The difference and its interval, with as many digits as small ones need."""
    found = ratio(differences, count)
    return "" if found is None else f"{found.mean:+.6f} ± {found.half_width:.6f}"


def measure(
    opened: OpenModel, data: TokenDataset, position: int, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Sums of −log p over the tokens after `position` of each document, by storage; and the sizes of the files."""
    losses: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for i in range(data.num_documents):
        if len(losses["exact"]) == options.documents:
            break
        text = torch.from_numpy(data.document(i)[: position + options.ahead].astype(np.int64))
        if len(text) < position + options.ahead:
            continue
        session = Session(opened.model, opened.inner, fingerprint=opened.fingerprint)
        session.read(text[:position])
        never_saved = session.score(text[position:])
        with tempfile.TemporaryDirectory() as directory:
            for storage in STORAGES:
                path = Path(directory) / storage
                session.save(path, storage=storage)
                sizes[storage] = path.stat().st_size
                nll = Session.restore(path, opened.model, fingerprint=opened.fingerprint).read(text[position:])
                if storage == "exact" and opened.model.device.type == "cpu" and not torch.equal(nll, never_saved):
                    sys.exit("no figure on red: a session saved exactly does not go on as if it had never been saved")
                losses[storage].append(nll.double().sum().item())
        fresh = Session(opened.model, opened.inner, fingerprint=opened.fingerprint)
        fresh.read(text[position - 1 : position])
        losses["nothing kept"].append(fresh.read(text[position:]).double().sum().item())
    return {name: sums for name, sums in losses.items() if sums}, sizes


if __name__ == "__main__":
    sys.exit(main())
