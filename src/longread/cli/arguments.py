"""Kinds of arguments that several commands share, and configs changed field by field."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from longread.config import UserError
from longread.config.checked import Checked

if TYPE_CHECKING:
    from longread.data import TextFormat
    from longread.loading import OpenModel

DEFAULT_MODEL = "longread-small"
MOST_TOKENS = 2**24
"""That an evaluation, or a step of training on one device, holds in memory at once: 128 times the paper's longest
context."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of a command that runs one model."""
    parser.add_argument(
        "--model",
        help=f"a model directory, a run, a checkpoint, or the name of a model that comes with Longread (default "
        f"{DEFAULT_MODEL}, which does)",
    )
    add_device(parser)


def settle_model(options: argparse.Namespace) -> None:
    """Where a command runs a model and none is named, takes the one that comes with Longread, and says so on stderr."""
    if getattr(options, "model", "") is None:
        options.model = DEFAULT_MODEL
        if not getattr(options, "quiet", False):
            print(f"longread: with the model {DEFAULT_MODEL}; --model takes another", file=sys.stderr)


def add_learn(parser: Any) -> None:
    """The option of a command whose model learns while it reads."""
    parser.add_argument(
        "--learn", action="store_true", help="let a converted model learn that was not adapted (it reads frozen else)"
    )


def add_kept_tokens(parser: argparse.ArgumentParser) -> None:
    """The option of a command whose model may see more than its windows."""
    parser.add_argument(
        "--kept-tokens",
        type=positive,
        metavar="N",
        help="let attention see, beyond its window, the N tokens that surprised most: details come back that were read "
        "long ago; without training, and for more memory a session (`longread estimate MODEL --kept-tokens N`)",
    )


def settle_reading(options: argparse.Namespace, opened: OpenModel, session: str | None = None) -> OpenModel:
    """The model as the command reads with it: it keeps --kept-tokens, and is called after them where it is not one that
    does so by itself. One that was converted and not adapted reads frozen, which is said, unless --learn lets it learn.

    Args:
        session: the file of a session that is gone on with. It says itself what it keeps, and whether it learns; then
            `say_if_frozen` follows.

    Raises:
        UserError: the model cannot keep tokens, or the session keeps others.
    """
    opened = _keeping(options.kept_tokens, opened, session)
    if options.learn:
        return opened._replace(learns=True)
    if session is None:
        say_if_frozen(options, opened, learns=opened.learns)
    return opened


def _keeping(tokens: int | None, opened: OpenModel, session: str | None) -> OpenModel:
    config = opened.model.config
    if session is not None:
        keeps = opened.as_saved(session)
        found = keeps.model.config.kept_tokens
        if tokens not in (None, found):
            raise UserError(
                f"--kept-tokens is {tokens}, and {session} keeps {found or 'none'}; leave the option out, or begin a "
                "session with it"
            )
    elif tokens is not None:
        try:
            keeps = opened.keeping(tokens, run=config.kept_run, distance=config.kept_distance)
        except UserError as error:
            raise UserError(f"--kept-tokens with {opened.name}: {error}") from None
    else:
        return opened
    found = keeps.model.config.kept_tokens
    return keeps if found == config.kept_tokens else keeps._replace(name=f"{opened.name} with {found:,} tokens kept")


def say_if_frozen(options: argparse.Namespace, opened: OpenModel, *, learns: bool) -> None:
    """Says on stderr that a model is read frozen since it was converted and not adapted, where that is the reason."""
    silent = getattr(options, "quiet", False) or getattr(options, "frozen", False)
    if not (learns or opened.learns or silent) and opened.model.config.num_suffix_blocks:
        print(
            f"longread: {opened.name} was converted and not adapted, so it reads frozen; `longread train` adapts it, "
            "and --learn lets it learn as it is",
            file=sys.stderr,
        )


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option of a command that computes."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1")


def add_json(parser: argparse.ArgumentParser, what: str = "all figures") -> None:
    """The options of a command that programs read too.

    One rule for all: what goes to stdout is either for people or, with `--json -`, JSON and nothing else; what is for
    people goes to stderr then, and `--quiet` leaves it out.
    """
    parser.add_argument("--json", metavar="FILE", help=f"write {what} here; - is stdout, and all else goes to stderr")
    parser.add_argument("--quiet", action="store_true", help="no tables and no progress; errors and warnings stay")
    add_force(parser)


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option of a command that writes files where others may be (`check_outputs`)."""
    parser.add_argument("--force", action="store_true", help="replace files that are where an output is to go")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options of a command that measures: where its figures go beside the terminal."""
    add_json(parser)
    parser.add_argument("--plots", metavar="DIR", help="write PNG plots here")
    parser.add_argument("--report", metavar="FILE", help="write an HTML page here")


def add_contexts(parser: argparse.ArgumentParser, of: str) -> None:
    """Declares --contexts, tokens `of` what."""
    parser.add_argument(
        "--contexts",
        type=positive,
        nargs="+",
        default=[1024, 2048, 4096],
        metavar="T",
        help=f"tokens {of} (default 1024 2048 4096)",
    )


def add_text_format(parser: argparse.ArgumentParser, *, markup: bool = True) -> None:
    """The options of a command that reads texts; `markup` where HTML is refused without being asked for."""
    parser.add_argument(
        "--encoding", metavar="NAME", help="of the texts (default: as their byte order mark says, or UTF-8)"
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are no text: strict refuses them (default), replace makes U+FFFD of them",
    )
    parser.add_argument(
        "--keep-line-ends", action="store_true", help="leave carriage returns (default: CRLF and CR become LF)"
    )
    if markup:
        parser.add_argument("--markup", action="store_true", help="read HTML and RTF with their tags")


def format_of(options: argparse.Namespace) -> TextFormat:
    """The format that the options of `add_text_format` name. Raises `UserError` for an encoding that does not exist."""
    from longread.data import TextFormat

    markup = getattr(options, "markup", True)
    return TextFormat(options.encoding, options.errors, options.keep_line_ends, markup)


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def check_at_most(option: str, value: int, limit: int = MOST_TOKENS, unit: str = "tokens") -> None:
    """Raises `UserError` for a number that can only be a slip, before the machine's memory is asked for it."""
    if value > limit:
        raise UserError(f"{option} {value} is more than {limit} {unit}; lower it")


AnyConfig = TypeVar("AnyConfig", bound=Checked)


def changed(config: AnyConfig, settings: Iterable[str]) -> AnyConfig:
    """`config` with each setting `dotted.field=value` in place; values are read as JSON, else as text.

    Raises:
        UserError: there is no such field, or the resulting config is not valid.
    """
    fields = dataclasses.asdict(config)  # type: ignore[call-overload]
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting} has no value; write it as field=value")
        *parents, name = path.split(".")
        place: Any = fields
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place or isinstance(place[name], dict):
            raise UserError(f"--set {path}: there is no such field; there are {', '.join(_paths(fields))}")
        place[name] = _value(text)
    return type(config).from_dict(fields)


def _value(text: str) -> Any:
    if text.lower() in ("none", "nan", "inf", "-inf"):
        return None if text.lower() == "none" else float(text)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _paths(fields: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
