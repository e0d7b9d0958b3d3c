"""Let a model learn from a long text that it has never seen, and read it frozen beside.

Without FILE it reads modules of the running Python's standard library that were held out when the model was trained.
Prints the loss of both readings by position, what learning has gained, and how each would go on. Takes seconds.

Example:
  longread demo
  longread demo book.txt --tokens 65536
"""

from __future__ import annotations

import argparse
import itertools
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

from longread.cli.arguments import add_model
from longread.config import UserError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from longread.loading import OpenModel
    from longread.session import Session

TOKENS = 16_384
PIECE = 1024
"""Tokens that both readers read in turn."""
CONTINUATION = 120


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("texts", nargs="*", metavar="FILE", help="texts to read, one after another")
    add_model(parser)
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"to read at most (default {TOKENS:,})")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from rich.console import Console

    from longread.data import read_texts
    from longread.loading import open_model

    if options.tokens <= PIECE:
        raise UserError(f"--tokens is {options.tokens}; give more than {PIECE}")
    opened = open_model(options.model, options.device)
    text = "\n\n".join(read_texts(options.texts)) if options.texts else unseen_library(opened)
    ids = (opened.tokenizer.beginning + opened.tokenizer.encode(text))[: options.tokens]
    if len(ids) <= PIECE:
        raise UserError(f"the text has {len(ids)} tokens; give one of more than {PIECE}")
    console = Console(width=100)
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
        console.print(continuation(session), "\n", markup=False, highlight=False)
    return 0


def read_both(learning: Session, frozen: Session, ids: list[int], console: Console) -> list[torch.Tensor]:
    """Both read the text piece by piece; returns the loss of every token, [tokens] each."""
    import torch
    from rich.live import Live

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
    from rich.table import Table

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


def continuation(session: Session) -> str:
    """How a session would go on; it stays where it is."""
    return "".join(
        session.fork().write(max_tokens=CONTINUATION, temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=0)
    )


def unseen_library(opened: OpenModel) -> str:
    """The standard library's modules that a model was not trained on, as its config.json says: a text as in training.

    File after file, each after a line with its name.
    """
    library, parts = Path(sysconfig.get_paths()["stdlib"]), []
    for module in opened.provenance.get("held_out_modules", ()):
        place = library / module
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.is_file() else []:
            name = file.relative_to(library).as_posix()
            if "/test" not in name and file.stat().st_size >= 200:
                parts.append(f"# python/{name}\n{file.read_text(encoding='utf-8', errors='replace').rstrip()}\n")
    if not parts:
        raise UserError(f"{opened.name} names no part of Python's library here that it has not seen; give FILE to read")
    return "\n\n".join(parts)
