"""A trained model reads a long text that it has never seen, and learns from it; the same weights read it frozen beside.

    make demo        or: python examples/read.py [--model models/longread-small] [--tokens 16384] [TEXT ...]

Without TEXT it reads modules of the running Python's standard library that were held out when the model was trained.
Prints the loss of both readings by position, what learning has gained, and how each would go on. Takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from longread.checkpoint import load_model
from longread.config import UserError
from longread.loading import OpenModel, open_model
from longread.session import Session

MODEL = Path(__file__).resolve().parents[1] / "models" / "longread-small"
TOKENS = 16_384
PIECE = 1024
"""Tokens that both readers read in turn."""
CONTINUATION = 120


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path, metavar="TEXT")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"to read (default {TOKENS})")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        return demo(options.model, options.texts, options.tokens, options.device)
    except UserError as error:
        print(f"read: error: {error}", file=sys.stderr)
        return 2


def demo(path: Path, texts: Sequence[Path], tokens: int, device: str) -> int:
    console = Console(width=100)
    opened = open_model(str(path), device)
    text = "\n\n".join(given(texts)) if texts else unseen_library(held_out_modules(path))
    ids = opened.tokenizer.beginning + opened.tokenizer.encode(text)
    if tokens <= PIECE:
        raise UserError(f"--tokens is {tokens}; give more than {PIECE}")
    if len(ids) <= PIECE:
        raise UserError(f"the text has {len(ids)} tokens; give one of more than {PIECE}")
    ids = ids[:tokens]
    console.print(
        f"{opened.model.config.num_parameters:,} parameters, {opened.model.config.num_fast_weights:,} of them learn "
        f"while reading.\nThe text: {len(ids):,} tokens, {len(opened.tokenizer.decode(ids)):,} characters.\n"
    )
    learning, frozen = (opened.session(learn=learn) for learn in (True, False))
    losses = read_both(learning, frozen, ids, console)
    gain = [(b - a).nanmean().item() for a, b in zip(*(x.split(len(ids) // 2) for x in losses), strict=False)][:2]
    console.print(
        f"\nLearning gains {gain[0]:.3f} nats per token over the first half of the text and {gain[1]:.3f} over the "
        f"second.\nThe session holds {learning.nbytes / 2**20:.0f} MiB, as it would after a million tokens.\n"
    )
    for name, session in (("learning", learning), ("frozen", frozen)):
        console.print(f"[bold]How it goes on, {name}:[/bold]")
        console.print(written(session, opened), "\n", markup=False, highlight=False)
    return 0


def read_both(learning: Session, frozen: Session, ids: list[int], console: Console) -> list[torch.Tensor]:
    """Both read the text piece by piece; returns the loss of every token, [tokens] each."""
    found: list[list[torch.Tensor]] = [[], []]
    seconds = [0.0, 0.0]
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for start in range(0, len(ids), PIECE):
            for i, session in enumerate((learning, frozen)):
                begun = time.perf_counter()
                found[i].append(session.read(ids[start : start + PIECE]).float().cpu())
                seconds[i] += time.perf_counter() - begun
            if console.is_terminal or start + PIECE >= len(ids):
                live.update(table([torch.cat(pieces) for pieces in found], seconds), refresh=True)
    return [torch.cat(pieces) for pieces in found]


def table(losses: list[torch.Tensor], seconds: list[float]) -> Table:
    """Losses by octave of positions, as far as they have been read."""
    read = len(losses[0])
    edges = [0, PIECE]
    while edges[-1] < read:
        edges.append(edges[-1] * 2)
    shown = Table("", title="Nats per token, by position", title_justify="left")
    for name in (*(f"{a:,}–{min(b, read):,}" for a, b in itertools.pairwise(edges)), "tokens/s"):
        shown.add_column(name, justify="right")
    for name, loss, spent in zip(("learning", "frozen"), losses, seconds, strict=True):
        means = [loss[a:b].nanmean().item() for a, b in itertools.pairwise(edges)]
        shown.add_row(name, *(f"{mean:.3f}" for mean in means), f"{read / max(spent, 1e-9):,.0f}")
    return shown


def written(session: Session, opened: OpenModel) -> str:
    tokens = session.fork().generate(CONTINUATION, temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=0)
    return opened.tokenizer.decode(tokens)


def given(paths: Sequence[Path]) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read a text: {error}") from None


def held_out_modules(path: Path) -> list[str]:
    """The standard library's modules that the model was not trained on, as its config.json says."""
    provenance: dict[str, Any] = load_model(path).metadata.get("provenance", {})
    modules = provenance.get("held_out_modules")
    if not modules:
        raise UserError(f"{path} does not say which modules it has not seen; name texts to read")
    return list(modules)


def unseen_library(modules: Sequence[str]) -> str:
    """The source of these modules, file after file, each after a line with its name: a text as in training."""
    library, parts = Path(sysconfig.get_paths()["stdlib"]), []
    for module in modules:
        place = library / module
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.is_file() else []:
            name = file.relative_to(library).as_posix()
            if "/test" not in name and file.stat().st_size >= 200:
                parts.append(f"# python/{name}\n{file.read_text(encoding='utf-8', errors='replace').rstrip()}\n")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
