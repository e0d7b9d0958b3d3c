"""Compare models by the loss at each position and context length, learning and frozen.

Example:
  longread evaluate runs/e2e runs/swa --data data/validation --report comparison.html
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from longread.cli.arguments import add_device, positive

if TYPE_CHECKING:
    import numpy as np

    from longread.cli.models import OpenModel
    from longread.evaluate import Document
    from longread.tokenizer import Tokenizer

NAME = "evaluate"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model directories, runs or checkpoints")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="a data set, or texts and directories")
    parser.add_argument("--documents", type=positive, metavar="N", help="read only the first N")
    parser.add_argument("--max-tokens", type=positive, metavar="T", help="read only the first T of each document")
    parser.add_argument("--min-tokens", type=positive, default=2, metavar="T", help="leave out shorter documents")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", metavar="T", help="context lengths (default 1024, 2048, …)"
    )
    parser.add_argument(
        "--indices", type=positive, nargs="+", default=[], metavar="I", help="single positions to report"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="documents side by side (default 8)")
    parser.add_argument("--no-control", action="store_true", help="leave out the frozen readings")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--plots", metavar="DIR", help="write PNG plots here")
    parser.add_argument("--report", metavar="FILE", help="write an HTML page here")
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from rich.console import Console

    from longread.cli.models import open_model
    from longread.cli.outputs import check_writable, stdout, write_report, write_text
    from longread.config import UserError
    from longread.evaluate import bin_edges, default_lengths, measure, print_tables, save_plots, summarize

    check_writable(options.json, options.report)
    measurements, lengths, console = [], options.lengths, Console(stderr=True)
    names = [Path(path).name for path in options.models]
    for path in options.models:
        opened = open_model(path, options.device)
        name = opened.name if names.count(opened.name) == 1 else path
        documents = _documents(options, opened)
        if not documents:
            raise UserError(f"no document has {options.min_tokens} tokens; lower --min-tokens or give longer texts")
        if lengths is None:
            lengths = default_lengths(max(len(document.tokens) for document in documents) - 1)
        edges = bin_edges(lengths, options.indices)
        learns = opened.model.config.num_suffix_blocks > 0
        for learn in (True, False) if learns and not options.no_control else (learns,):
            with console.status(f"{path}: reading {len(documents)} documents {'learning' if learn else 'frozen'}"):
                measurements.append(
                    measure(
                        name,
                        opened.model,
                        opened.inner,
                        documents,
                        edges,
                        learn=learn,
                        batch_size=options.batch_size,
                        bos_id=opened.tokenizer.bos_id,
                    )
                )
    evaluation = summarize(measurements, lengths=lengths or (), indices=options.indices)
    print_tables(evaluation, stdout())
    if options.json:
        write_text(options.json, json.dumps(evaluation.as_json(), indent=2) + "\n")
    if options.plots:
        save_plots(evaluation, Path(options.plots))
    if options.report:
        write_report(
            options.report, evaluation, title="Evaluation", lead=", ".join(options.models) + f" on {options.data[0]}."
        )
    return 0


def _documents(options: argparse.Namespace, opened: OpenModel) -> list[Document]:
    """What is to be read, in the tokens of one model."""
    from longread.evaluate import Document

    found = _of_dataset(options.data[0], opened) if len(options.data) == 1 else None
    documents = found if found is not None else _of_texts(options.data, opened)
    return [
        Document(name, tokens[: options.max_tokens], None if lengths is None else lengths[: options.max_tokens])
        for name, tokens, lengths in documents
        if len(tokens) >= options.min_tokens
    ][: options.documents]


def _of_dataset(path: str, opened: OpenModel) -> list[Document] | None:
    """The documents of a data set; None if there is none at `path`."""
    from longread.config import UserError
    from longread.data import TokenDataset
    from longread.evaluate import Document

    if not (Path(path) / "index.json").is_file():
        return None
    dataset = TokenDataset.open(path)
    if dataset.tokenizer_fingerprint not in (None, opened.tokenizer.fingerprint):
        raise UserError(f"{path} was prepared with another tokenizer than {opened.name}; give the texts themselves")
    documents = []
    for i in range(dataset.num_documents):
        tokens = dataset.document(i)
        documents.append(Document(dataset.document_name(i), tokens, _byte_lengths(tokens, opened.tokenizer)))
    return documents


def _byte_lengths(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes that each token covers; None where the text cannot be told from the tokens."""
    import numpy as np

    ids = tokens.tolist()
    bos = ids[:1] if ids[:1] == [tokenizer.bos_id] else []
    again, lengths = tokenizer.encode_with_bytes(tokenizer.decode(ids[len(bos) :]))
    return np.array([0] * len(bos) + lengths) if bos + again == ids else None


def _of_texts(paths: list[str], opened: OpenModel) -> list[Document]:
    import numpy as np

    from longread.data import read_texts
    from longread.evaluate import Document

    bos = [] if opened.tokenizer.bos_id is None else [opened.tokenizer.bos_id]
    documents = []
    for i, text in enumerate(read_texts(paths)):
        ids, byte_lengths = opened.tokenizer.encode_with_bytes(text)
        documents.append(Document(f"text {i + 1}", np.array(bos + ids), np.array([0] * len(bos) + byte_lengths)))
    return documents
