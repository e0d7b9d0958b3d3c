"""Compare models by the loss at each position and context length, learning and frozen.

Models with different tokenizers are compared on texts, in bits per byte, and --lengths and --indices are then bytes.

Example:
  longread evaluate runs/e2e runs/swa --data data/validation --report comparison.html
  longread evaluate converted runs/e2e runs/swa runs/full --full converted --data books --max-tokens 131072
  longread evaluate runs/e2e --data data/validation --mini-batch 32 64 128 --health --json by-mini-batch.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from longread.cli.arguments import (
    add_device,
    add_kept_tokens,
    add_learn,
    add_outputs,
    add_text_format,
    check_at_most,
    format_of,
    positive,
    settle_reading,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model directories, runs or checkpoints")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="a data set, or texts and directories")
    add_text_format(parser)
    parser.add_argument("--documents", type=positive, metavar="N", help="read only the first N")
    parser.add_argument("--max-tokens", type=positive, metavar="T", help="read only the first T of each document")
    parser.add_argument("--min-tokens", type=positive, default=2, metavar="T", help="leave out shorter documents")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", metavar="T", help="context lengths (default 1024, 2048, …)"
    )
    parser.add_argument(
        "--indices", type=positive, nargs="+", default=[], metavar="I", help="single positions to report"
    )
    parser.add_argument(
        "--window", type=positive, nargs="+", metavar="K", help="read with these windows instead of the trained one"
    )
    parser.add_argument(
        "--full",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="read these too, frozen and with full attention: what converted models were before",
    )
    parser.add_argument(
        "--mini-batch", type=positive, nargs="+", metavar="M", help="and with these mini-batches; every combination"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="documents side by side (default 8)")
    parser.add_argument("--no-control", action="store_true", help="leave out the frozen readings")
    parser.add_argument("--health", action="store_true", help="show gradient norms, clipping and drift by position")
    add_learn(parser)
    add_kept_tokens(parser)
    add_outputs(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.documents import longest_of, read_for_all
    from longread.cli.models import read_otherwise, read_whole, table_names
    from longread.cli.outputs import (
        check_figures,
        listed,
        progress_console,
        tables_console,
        write_text,
    )
    from longread.evaluate import (
        bin_edges,
        default_lengths,
        evaluation_charts,
        health_figures,
        html_report,
        measure,
        print_figures,
        print_tables,
        save_charts,
        summarize,
    )
    from longread.evaluate.positions import LONGEST
    from longread.loading import open_model, open_tokenizer

    for option, values in (("--lengths", options.lengths or ()), ("--indices", options.indices)):
        for value in values:
            check_at_most(option, value, LONGEST)
    for option, values in (("--window", options.window or ()), ("--mini-batch", options.mini_batch or ())):
        for value in values:
            check_at_most(option, value)
    charts = ["loss_by_position", "loss_by_context_length"]
    charts += ["inner_gradient_norm", "drift"] if options.health else []
    check_figures(options, charts, inputs=options.data)
    models = list(zip(options.models, table_names(options.models), strict=True))
    whole = list(zip(options.full, table_names(options.full), strict=True))
    tokenizers = {name: open_tokenizer(path) for path, name in models}
    tokenizers |= {f"{name}, full attention": open_tokenizer(path) for path, name in whole}
    texts = read_for_all(
        options.data,
        tokenizers,
        first=options.documents,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        text_format=format_of(options),
    )
    longest, unit = longest_of(texts)
    for option, values in (("--lengths", options.lengths or ()), ("--indices", options.indices)):
        check_at_most(option, max(values, default=0), longest - 1, f"{unit}, and no document has more than {longest}")
    lengths = default_lengths(longest - 1) if options.lengths is None else options.lengths
    edges = bin_edges(lengths, options.indices)
    measurements, console, screen = [], progress_console(options), tables_console(options)
    for i, (path, name) in enumerate([*models, *whole]):
        opened = open_model(path, options.device)._replace(name=name)
        documents = texts[opened.tokenizer.fingerprint]
        if i < len(models):
            variants = read_otherwise(settle_reading(options, opened), options.window, options.mini_batch)
        else:
            variants = [read_whole(opened)]
        for variant in variants:
            learns = variant.learns and variant.model.config.num_suffix_blocks > 0
            for learn in (True, False) if learns and not options.no_control else (learns,):
                way = "learning" if learn else "frozen"
                with console.status(f"{variant.name}: reading {len(documents)} documents {way}"):
                    measurements.append(
                        measure(
                            variant.name,
                            variant.model,
                            variant.inner,
                            documents,
                            edges,
                            learn=learn,
                            batch_size=options.batch_size,
                            bos_id=variant.tokenizer.bos_id,
                            close=options.health,
                        )
                    )
    evaluation = summarize(measurements, lengths=lengths, indices=options.indices)
    print_tables(evaluation, screen)
    health = health_figures(evaluation) if options.health else None
    if health:
        print_figures(health, screen)
    if options.json:
        write_text(options.json, json.dumps(evaluation.as_json(), indent=2) + "\n")
    if options.plots:
        save_charts([*evaluation_charts(evaluation), *(health.charts if health else ())], Path(options.plots))
    if options.report:
        lead = f"{listed(options.models)} on {listed(options.data)}."
        write_text(options.report, html_report(evaluation, title="Evaluation", lead=lead, more=health))
    return 0
