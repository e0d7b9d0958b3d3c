"""Ask about texts after they were read, with questions that are made from the texts themselves.

Example:
  longread questions runs/e2e runs/full --data books --contexts 8192 16384 32768
  longread questions runs/e2e --data src/parser.py --contexts 4096 --questions 20 --json answers.json

Prose is asked for names, for words that follow words that are quoted, and for who bears a title; Python source for
functions, classes, base classes and default values.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from longread.cli.arguments import (
    add_contexts,
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

if TYPE_CHECKING:
    from longread.evaluate import AskedText
    from longread.loading import OpenModel

MOST_CHOICES = 26


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model directories, runs or checkpoints")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="a data set, or texts and directories")
    add_text_format(parser)
    add_contexts(parser, "of a text that are read before it is asked about")
    parser.add_argument("--documents", type=positive, default=8, metavar="N", help="ask about the first N (default 8)")
    parser.add_argument(
        "--questions", type=positive, default=8, metavar="N", help="of each kind, text and context (default 8)"
    )
    parser.add_argument("--choices", type=positive, default=6, metavar="N", help="possible answers (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked (default 0)")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="B", help="answers read side by side (default 8)"
    )
    parser.add_argument("--no-control", action="store_true", help="leave out frozen readings, and with nothing read")
    add_learn(parser)
    add_kept_tokens(parser)
    add_outputs(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.models import table_names
    from longread.cli.outputs import check_figures, counted, listed, progress_console, show_figures, write_text
    from longread.config import UserError
    from longread.evaluate import QuestionAnswering, answer_figures, answer_questions
    from longread.evaluate.answering import CHART
    from longread.loading import open_model, open_tokenizer

    check_at_most("--contexts", max(options.contexts))
    if not 2 <= options.choices <= MOST_CHOICES:
        raise UserError(f"--choices {options.choices} is not between 2 and {MOST_CHOICES}")
    check_figures(options, [CHART], inputs=options.data)
    prints = [open_tokenizer(path).fingerprint for path in options.models]
    for path, fingerprint in zip(options.models, prints, strict=True):
        if fingerprint != prints[0]:
            raise UserError(
                f"{path} has another tokenizer than {options.models[0]}: a context would be another length of text; "
                "ask them one by one"
            )
    answers, console = [], progress_console(options)
    texts: list[AskedText] = []
    for path, name in zip(options.models, table_names(options.models), strict=True):
        opened = settle_reading(options, open_model(path, options.device)._replace(name=name))
        texts = texts or _texts(options, opened)
        total = sum(len(text.questions) for text in texts)
        learns = opened.learns and opened.model.config.num_suffix_blocks > 0
        ways = [(learn, None) for learn in ((True, False) if learns and not options.no_control else (learns,))]
        for learn, beginning in ways if options.no_control else [*ways, (False, opened.tokenizer.beginning)]:
            way = "with nothing read" if beginning is not None else "learning" if learn else "frozen"
            with counted(console, opened.name, total, f"questions, {way}") as show:
                answers.append(
                    answer_questions(
                        opened.name,
                        opened.model,
                        opened.inner,
                        texts,
                        learn=learn,
                        beginning=beginning,
                        batch_size=options.batch_size,
                        on_questions=show,
                    )
                )
    chance = f"who takes one of {options.choices} choices by chance is right {1 / options.choices:.2f} of the time"
    notes = [f"{total:,} questions, {len(texts):,} {'texts' if len(texts) > 1 else 'text'}; {chance}."]
    answering = QuestionAnswering(answers, options.choices, notes)
    if options.json:
        write_text(options.json, json.dumps(answering.as_json(), indent=2) + "\n", private=True)  # it quotes the texts
    lead = f"{listed(options.models)} after reading {listed(options.data)}."
    show_figures(options, answer_figures(answering), title="Questions after reading", lead=lead)
    return 0


def _texts(options: argparse.Namespace, opened: OpenModel) -> list[AskedText]:
    """The texts, and what is asked about each beginning of them that it has."""
    from longread.cli.documents import bytes_of_tokens, read_documents
    from longread.config import UserError
    from longread.evaluate import AskedText, make_questions

    documents = read_documents(
        options.data,
        opened,
        first=options.documents,
        min_tokens=min(options.contexts),
        asked_by="--contexts",
        text_format=format_of(options),
    )
    texts = []
    for document in documents:
        byte_lengths = bytes_of_tokens(document.tokens, opened.tokenizer)
        if byte_lengths is None:
            raise UserError(
                f"{opened.name} decodes the tokens of {document.name} to a text of other tokens, so it is not known "
                "where they tell what; give other texts"
            )
        text = opened.tokenizer.decode(document.tokens.tolist())
        questions = [
            question
            for T in sorted(set(options.contexts))
            if len(document.tokens) >= T
            for question in make_questions(
                text,
                byte_lengths,
                opened.tokenizer,
                T,
                per_kind=options.questions,
                num_choices=options.choices,
                seed=options.seed,
            )
        ]
        read = document.tokens[: max(options.contexts)].astype("int64")
        texts.append(AskedText(document.name, read, questions))
    if not any(text.questions for text in texts):
        raise UserError(
            f"of no text can {options.choices} answers of one kind be found; lower --choices, raise --contexts or give "
            "texts with more names or functions"
        )
    return texts
