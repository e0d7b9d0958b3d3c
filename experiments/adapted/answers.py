"""What an adapted model knows of what it has read: answers to questions, guesses for a verifier, and what it writes.

Books are asked about in stretches, four of each, that begin at equal distances; Python source is that of the Python
which runs this. The original is the pretrained model as it was, with full attention and nothing that learns.

    python -m experiments.adapted.answers original READER OUT
    python -m experiments.adapted.answers stretches BOOKS OUT
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from experiments.adapted.plan import BESIDE, Plan
from experiments.plan import Command

STRETCHES, STRETCH_CHARACTERS = 4, 150_000
"""Of each book; the longest context and a little more."""
CONTEXTS = (8, 16, 32)
READ_BY_ORIGINAL = 8
"""Units of text that full attention can read."""
QUESTIONS = 5
"""Of each kind, text and context."""
ROWS, ROWS_OF_FULL = 64, 16
"""Answers that are read side by side; with full attention each has keys and values of its own."""
SOURCES = (
    *("turtle.py", "tkinter/__init__.py", "_pydecimal.py", "typing.py", "inspect.py", "tarfile.py", "mailbox.py"),
    *("argparse.py", "email/_header_value_parser.py", "urllib/request.py", "datetime.py", "subprocess.py", "enum.py"),
    *("logging/__init__.py", "ipaddress.py", "http/cookiejar.py", "difflib.py", "pickle.py"),
)
"""Long files of the standard library."""
WRITTEN, BINS = 2, 8
"""Units that are written, after six that were read, and the judge's bins."""
DRAFTED_TOKENS, LOOKED_AT = 64, 128


def jobs(plan: Plan) -> None:
    """Questions about books first; those about source are left out of a rehearsal, which reads too little to ask."""
    original, stretches = plan.reader("original"), plan.work / "stretches"
    command = ("-m", __name__, "original", str(plan.reader("reader")), str(original))
    plan.job("original", 0, [Command(command, original / "config.json")], ("reader",), seconds=20, gibibytes=0)
    command = ("-m", __name__, "stretches", str(plan.data / "books"), str(stretches))
    plan.job("stretches", 0, [Command(command, stretches / "ready")], seconds=10, gibibytes=0)
    models = [str(plan.run_of(name)) for name in ("first-order", "swa", "full")] + [str(original)]
    needs = ("first-order", "swa", "full", "original", "stretches")
    books, documents = [str(stretches / "texts")], _documents(plan)
    source = Path(sysconfig.get_path("stdlib"))
    files = [str(source / name) for name in SOURCES if (source / name).is_file()]
    wanted = (
        ("questions", models[:2], CONTEXTS, ROWS),
        ("questions-full", models[2:], (READ_BY_ORIGINAL,), ROWS_OF_FULL),
    )
    ask(plan, "questions-books", 1, books, wanted, needs, seconds=65)
    if not plan.rehearsed:
        ask(plan, "questions-source", 3, files, wanted, needs, seconds=45)
    judged = {
        "judge": (2, models[:2], 60, ()),
        "judge-plain": (2, models[:3], 80, ("--repetition-penalty", "1")),
        "judge-full": (4, models[2:3], 40, ()),
    }
    for name, (tier, writers, seconds, options) in judged.items():
        result, length = plan.result_of(name, "written"), READ_BY_ORIGINAL * plan.unit
        arguments = ["judge", *writers, "--judge", str(original), "--data", *books, "--documents", documents]
        arguments += ["--context", str(length), "--written", str(WRITTEN * plan.unit), "--bins", str(BINS), *options]
        command = (*arguments, "--batch-size", documents, "--json", str(result))
        plan.job(
            name, tier, [Command(command, result)], needs, seconds=BESIDE * seconds, gibibytes=40, experiment="answers"
        )
    position = READ_BY_ORIGINAL * plan.unit - 2 * LOOKED_AT
    count = ("--documents", "1" if plan.rehearsed else "7", "--tokens", str(DRAFTED_TOKENS), "--ahead", str(LOOKED_AT))
    for tier, name, verifier in ((2, "drafts", models[3]), (4, "drafts-full", models[2])):
        result = plan.result_of(name, "speculative")
        arguments = ["-m", "benchmarks.speculative", verifier, models[0], "--data", str(plan.data / "validation")]
        arguments += ["--positions", str(position), *count, "--skip-tests", "--json", str(result)]
        plan.job(name, tier, [Command(tuple(arguments), result)], needs, seconds=BESIDE * 40, experiment="answers")


def _documents(plan: Plan) -> str:
    return "2" if plan.rehearsed else "28"


def ask(
    plan: Plan,
    job: str,
    tier: int,
    texts: Sequence[str],
    wanted: Sequence[tuple[str, Sequence[str], Sequence[int], int]],
    needs: Sequence[str],
    *,
    seconds: float,
) -> None:
    """A job that asks about texts: of each result that is wanted its name, the models, contexts in units, and how many
    answers are read side by side."""
    commands = []
    for what, models, contexts, rows in wanted:
        lengths = sorted({plan.shown(units) * plan.unit for units in contexts})
        arguments = ["questions", *models, "--data", *texts, "--contexts", *map(str, lengths)]
        arguments += ["--documents", _documents(plan), "--questions", str(QUESTIONS), "--batch-size", str(rows)]
        result = plan.result_of(job, what)
        commands.append(Command((*arguments, "--json", str(result)), result))
    plan.job(job, tier, commands, needs, seconds=BESIDE * seconds, gibibytes=30, experiment="answers")


def main(arguments: list[str] | None = None) -> int:
    """Makes what the jobs read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("original", "stretches"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    (save_original if options.what == "original" else cut)(options.source, options.out)
    return 0


def save_original(reader: Path, out: Path) -> None:
    """The model that `reader` was converted from: full attention, and no MLPs that add nothing."""
    from longread.checkpoint import load_model, save_model
    from longread.model import undrawn
    from longread.recipes import without_fast_weights
    from longread.train.beginning import begin_with, copy_tokenizer

    loaded = load_model(reader)
    tokenizer_fingerprint = loaded.metadata["tokenizer_fingerprint"]
    config = dataclasses.replace(without_fast_weights(loaded.model.config), attention="full")
    model = undrawn(config).to_empty(device="cpu")
    begin_with(model, loaded, reader, tokenizer_fingerprint)
    provenance = loaded.metadata.get("provenance", {})
    copy_tokenizer(reader, out)
    save_model(out, model, loaded.inner, tokenizer_fingerprint, provenance, learns=False)


def cut(books: Path, out: Path) -> None:
    """Stretches of each text in a folder, a file each in out/texts; out/ready is made last."""
    (out / "texts").mkdir(parents=True, exist_ok=True)
    for path in sorted(books.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        for i in range(STRETCHES):
            start = text.find("\n\n", len(text) * i // STRETCHES) if i else 0
            (out / "texts" / f"{path.stem}-{i}.txt").write_text(
                text[start:][:STRETCH_CHARACTERS].strip(), encoding="utf-8"
            )
    (out / "ready").touch()


if __name__ == "__main__":
    sys.exit(main())
