"""Turn texts into token shards to train and evaluate on.

Example:
  longread prepare ~/books "notes/*.md" --out data --train-tokenizer 4096 --validation-fraction 0.05
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from longread.cli.arguments import add_json, add_text_format, check_at_most, format_of, positive
from longread.config import UserError

FORMAT = "longread-prepare/1"
MOST_ENTRIES = 2**20
"""Of a tokenizer; four times the largest in use."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="text files, directories, globs, .jsonl and .parquet (a document a row), hf:NAME[:CONFIGURATION][:SPLIT], "
        "Zarr token arrays",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--tokenizer", default="bytes", help="bytes (default), a tokenizer.json, a model or other directory with one"
    )
    which.add_argument("--train-tokenizer", type=positive, metavar="SIZE", help="train a byte-level BPE on the sources")
    parser.add_argument(
        "--documents",
        choices=("reset", "join"),
        default="reset",
        help="reset: a training sequence never crosses documents (default); join: one stream",
    )
    parser.add_argument("--validation-fraction", type=float, default=0.0, metavar="X", help="held out, by document")
    parser.add_argument("--field", default="text", help="of .jsonl and .parquet rows (default text)")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="file or folder; repeatable")
    parser.add_argument("--vocab-size", type=positive, metavar="N", help="of token arrays; needs no tokenizer")
    parser.add_argument("--bos-id", type=int, metavar="ID", help="of token arrays")
    parser.add_argument("--array-tokens", type=positive, metavar="N", help="read the first N of each token array")
    parser.add_argument(
        "--stretch", type=positive, metavar="T", help="cut token arrays every T tokens, as the official loader does"
    )
    add_text_format(parser, markup=False)
    parser.add_argument("--overwrite", action="store_true", help="replace the data set at DIR")
    add_json(parser, "what was made")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.outputs import check_data_set, check_outputs, progress_console, tables_console, write_text
    from longread.data import PrepareProgress, prepare, read_pieces
    from longread.tokenizer import Tokenizer, load_tokenizer, train_bpe

    check_outputs(options, inputs=options.sources)
    if options.overwrite:
        check_data_set(options.out)
    text_format = format_of(options)
    tokenizer: Tokenizer | None = None
    if options.train_tokenizer:
        check_at_most("--train-tokenizer", options.train_tokenizer, MOST_ENTRIES, "entries")
        pieces = read_pieces(
            options.sources, text_field=options.field, exclude=options.exclude, text_format=text_format
        )
        tokenizer = train_bpe(pieces, options.train_tokenizer, show_progress=progress_console(options).is_terminal)
    elif options.vocab_size and options.tokenizer != "bytes":
        raise UserError(
            f"--vocab-size {options.vocab_size} is for token arrays without a tokenizer, and --tokenizer "
            f"{options.tokenizer} has its own; leave out one of the two"
        )
    elif not options.vocab_size:
        tokenizer = load_tokenizer(_place(options.tokenizer))
    with progress_console(options).status("reading") as status:

        def show(progress: PrepareProgress) -> None:
            status.update(f"{progress.documents:,} documents, {progress.tokens:,} tokens: {progress.source}")

        dataset = prepare(
            options.sources,
            options.out,
            tokenizer,
            documents=options.documents,
            text_field=options.field,
            validation_fraction=options.validation_fraction,
            exclude=options.exclude,
            vocab_size=options.vocab_size,
            bos_id=options.bos_id,
            array_tokens=options.array_tokens,
            stretch=options.stretch,
            text_format=text_format,
            overwrite=options.overwrite,
            progress=show,
        )
    screen = tables_console(options)
    parts = {name: part for name, part in (("train", dataset), ("validation", dataset.validation)) if part is not None}
    for name, part in parts.items():
        screen.out(
            f"{part.directory}: {part.num_documents:,} documents, {part.num_tokens:,} tokens ({name})", highlight=False
        )
    skipped = dataset.index.get("skipped", {})
    if skipped:
        print("skipped: " + ", ".join(f"{count:,} {kind}" for kind, count in skipped.items()), file=sys.stderr)
    if options.json:
        made = {
            name: {"directory": str(part.directory), "documents": part.num_documents, "tokens": part.num_tokens}
            for name, part in parts.items()
        }
        about = {"vocab_size": dataset.vocab_size, "tokenizer_fingerprint": dataset.tokenizer_fingerprint}
        write_text(options.json, json.dumps({"format": FORMAT, **about, **made, "skipped": skipped}, indent=2) + "\n")
    return 0


def _place(spec: str) -> str | Path:
    """Where the tokenizer lies that `spec` names, that of a model among others."""
    from longread.checkpoint import find_tokenizer
    from longread.loading import boxed_models

    if spec == "bytes":
        return spec
    path = spec if os.path.exists(spec) else boxed_models().get(spec, spec)
    return find_tokenizer(path) or path
