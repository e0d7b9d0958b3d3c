"""Continue a text, or a session that has read one.

Example:
  longread generate --model runs/toy --session book.session --prompt "Once more" --max-tokens 200
  longread generate --model runs/toy --prompt-file question.txt --json -
  longread generate --model runs/toy --session book.session --save book.session --interactive
  longread generate --model runs/full --draft runs/toy --prompt "Once more"

A session reads what it writes, and it has read just what was shown: nothing of a stop text, and nothing that was not
shown when Ctrl-C or a closed pipe ended it.

Interactive: each line is read, answered, and learned from; an empty one lets the text go on. Ctrl-C ends an answer,
Ctrl-D the session. On a terminal that is what happens without a prompt and without a session.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from longread.cli.arguments import add_json, add_kept_tokens, add_learn, add_model, say_if_frozen, settle_reading

if TYPE_CHECKING:
    from longread.loading import OpenModel
    from longread.session import Session
    from longread.speculative import Speculation


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add_model(parser)
    parser.add_argument("--session", metavar="FILE", help="go on with this saved session")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="read this first")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read this file first, as it is; - reads stdin")
    prompt.add_argument("--interactive", action="store_true", help="take prompts line by line")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="write at most N (default 200)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0 takes the likeliest token (default 1)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the fewest likeliest tokens that hold this much probability (default 1: from all)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: from all)")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1, tokens of the last window become less likely (default 1: nothing changes)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same seed draws the same text (default: another each time)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    learning = parser.add_mutually_exclusive_group()
    learning.add_argument("--frozen", action="store_true", help="do not learn from prompt and continuation")
    add_learn(learning)
    add_kept_tokens(parser)
    parser.add_argument("--save", metavar="FILE", help="keep the session here afterwards")
    parser.add_argument(
        "--draft", metavar="MODEL", help="a faster model that guesses what --model writes, and learns from it"
    )
    parser.add_argument("--draft-session", metavar="FILE", help="let the guessing one go on with this saved session")
    parser.add_argument("--draft-tokens", type=int, metavar="N", help="guesses at a time (default 4)")
    add_json(parser, "the continuation")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.answers import Answers, converse, write_answer
    from longread.cli.outputs import check_outputs
    from longread.cli.reading.stops import StopSignals
    from longread.config import UserError
    from longread.loading import open_model

    inputs = [options.draft_session, options.prompt_file]
    check_outputs(options, inputs=inputs, goes_on_with=[("--save", options.session)])
    if "" in options.stop:
        raise UserError("--stop is empty; give the text before which to end")
    if options.draft_session and not options.draft:
        raise UserError("--draft-session belongs to --draft; give the model that read it")
    if options.draft_tokens is not None and not options.draft:
        raise UserError("--draft-tokens belongs to --draft; give the model that guesses")
    interactive = options.interactive or _is_conversation(options)
    if interactive and options.json:
        raise UserError("--json is about one continuation; give a prompt, or leave it out")
    prompt = _prompt(options)
    opened = settle_reading(options, open_model(options.model, options.device), options.session)
    session = opened.restore(options.session) if options.session else opened.session()
    learns = session.learn or options.learn
    if options.session:
        say_if_frozen(options, opened, learns=learns)
    session.learn = learns and not options.frozen
    pair = _with_draft(options, opened, session) if options.draft else None
    answers = Answers(options, opened.tokenizer, session, pair)

    def save() -> None:
        if options.save:
            session.learn = learns  # --frozen is about this command, not about all who go on with the session
            session.save(options.save)
            session.learn = learns and not options.frozen

    with StopSignals(lambda first: "") as stops:
        if interactive:
            return converse(answers, stops, save)
        try:
            with stops.open():
                write_answer(options, answers, prompt)
        finally:  # what was shown until an interrupt has been read too, and is kept
            save()
    if pair is not None and pair.rounds and not options.quiet:
        drafted, accepted = sum(x.drafted for x in pair.rounds), sum(x.accepted for x in pair.rounds)
        found = f"{accepted} of {drafted} guesses were right, {accepted / len(pair.rounds):.2f} in each round"
        print(found, file=sys.stderr)
    return 0


def _is_conversation(options: argparse.Namespace) -> bool:
    """Whether somebody sits there who has given nothing to continue."""
    given = options.prompt or options.prompt_file or options.session or options.json
    terminals = [stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)]
    return not given and all(terminals)


def _prompt(options: argparse.Namespace) -> str:
    from longread.data import TextFile

    return "".join(TextFile(options.prompt_file)) if options.prompt_file else str(options.prompt)


def _with_draft(options: argparse.Namespace, opened: OpenModel, session: Session) -> Speculation:
    from longread.config import UserError
    from longread.loading import open_model
    from longread.speculative import Speculation
    from longread.speculative.speculation import DRAFT_TOKENS

    drafter = open_model(options.draft, options.device)
    if drafter.tokenizer.fingerprint != opened.tokenizer.fingerprint:
        raise UserError(f"{options.draft} and {options.model} have different tokenizers; give two models with one")
    if session.learn and opened.model.config.num_suffix_blocks:
        raise UserError(f"{options.model} learns while it writes, so nobody can look ahead for it; add --frozen")
    guessing = drafter.restore(options.draft_session) if options.draft_session else drafter.session()
    guessing.learn = guessing.learn and not options.frozen
    count = DRAFT_TOKENS if options.draft_tokens is None else options.draft_tokens
    return Speculation(session, guessing, draft_tokens=count)
