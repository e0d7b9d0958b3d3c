"""Continue a text, or a session that has read one.

Example:
  longread generate --model runs/toy --session book.session --prompt "Once more" --max-tokens 200
  longread generate --model runs/full --draft runs/toy --prompt "Once more"
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from longread.cli.arguments import add_model

if TYPE_CHECKING:
    from longread.loading import OpenModel
    from longread.session import Session
    from longread.speculative import Speculation

NAME = "generate"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add_model(parser)
    parser.add_argument("--session", metavar="FILE", help="go on with this saved session")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="read this first")
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
    parser.add_argument("--frozen", action="store_true", help="do not learn from prompt and continuation")
    parser.add_argument("--save", metavar="FILE", help="keep the session here afterwards")
    parser.add_argument(
        "--draft", metavar="MODEL", help="a faster model that guesses what --model writes, and learns from it"
    )
    parser.add_argument("--draft-session", metavar="FILE", help="let the guessing one go on with this saved session")
    parser.add_argument("--draft-tokens", type=int, metavar="N", help="guesses at a time (default 4)")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.outputs import SESSION, Output, check_outputs
    from longread.config import UserError
    from longread.loading import open_model
    from longread.session import text_of

    check_outputs([Output("--save", options.save, SESSION)], inputs=[options.draft_session])
    if "" in options.stop:
        raise UserError("--stop is empty; give the text before which to end")
    if options.draft_session and not options.draft:
        raise UserError("--draft-session belongs to --draft; give the model that read it")
    if options.draft_tokens is not None and not options.draft:
        raise UserError("--draft-tokens belongs to --draft; give the model that guesses")
    opened = open_model(options.model, options.device)
    session = _session(opened, options.session)
    learns = session.learn
    session.learn = learns and not options.frozen
    pair = _with_draft(options, opened, session) if options.draft else None
    writer = pair or session
    sessions = [pair.verifier, pair.drafter] if pair else [session]
    fresh, tokenizer = session.position <= len(opened.tokenizer.beginning), opened.tokenizer
    writer.read(tokenizer.encode(options.prompt) if fresh else tokenizer.encode_inside(options.prompt)[0])
    ids = writer.generate(
        options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop_ids=opened.tokenizer.beginning,
    )
    try:
        with contextlib.closing(text_of(ids, opened.tokenizer, sessions, stops=options.stop)) as text:
            for piece in text:
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
    finally:  # what was written until an interrupt has been read too, and is kept
        if options.save:
            session.learn = learns  # --frozen is about this command, not about all who go on with the session
            session.save(options.save)
    if pair is not None and pair.rounds:
        drafted, accepted = sum(x.drafted for x in pair.rounds), sum(x.accepted for x in pair.rounds)
        found = f"{accepted} of {drafted} guesses were right, {accepted / len(pair.rounds):.2f} in each round"
        print(found, file=sys.stderr)
    return 0


def _session(opened: OpenModel, path: str | None) -> Session:
    """The saved session, or one that has read nothing but the beginning of a text."""
    session = opened.restore(path) if path else opened.session()
    if not session.position:
        session.read(opened.tokenizer.beginning)
    return session


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
    guessing = _session(drafter, options.draft_session)
    guessing.learn = guessing.learn and not options.frozen
    count = DRAFT_TOKENS if options.draft_tokens is None else options.draft_tokens
    return Speculation(session, guessing, draft_tokens=count)
