"""Serve a model: OpenAI's routes, sessions, and a page to watch it learn.

Example:
  longread serve --model runs/toy --directory sessions
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longread.cli.arguments import add_kept_tokens, add_learn, add_model, positive, settle_reading

if TYPE_CHECKING:
    from longread.engine import Limits
    from longread.model import Transformer
    from longread.server import ServerLimits


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add_model(parser)
    add_learn(parser)
    add_kept_tokens(parser)
    parser.add_argument("--directory", metavar="DIR", help="keep sessions here (default: only while the server runs)")
    parser.add_argument("--name", help="what the model is called in requests (default: its directory's name)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--keys", metavar="FILE", help="lines of a tenant and an API key")
    parser.add_argument("--metrics-keys", metavar="FILE", help="lines of a name and a key: /metrics takes only these")
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="for sessions where the model computes (default: 70%% of what is free)",
    )
    parser.add_argument(
        "--host-memory",
        type=float,
        metavar="GIB",
        help="for others, in the host's memory (default: 70%% of what is free; on a CPU, what the first leaves)",
    )
    parser.add_argument("--disk", type=float, metavar="GIB", help="for sessions on the disk")
    parser.add_argument("--max-sessions", type=positive, metavar="N", help="of all tenants together")
    parser.add_argument("--max-batch", type=positive, default=32, metavar="N", help="computed together (default 32)")
    parser.add_argument("--max-waiting", type=positive, default=256, metavar="N", help="tasks (default 256)")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="compute each session by itself: it gets bit for bit what it would get alone, slower",
    )
    parser.add_argument(
        "--keep-line-ends", action="store_true", help="read carriage returns (default: CRLF and CR become LF)"
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="prompts that begin with what a session of the tenant has read go on from it",
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of each tenant or request, as docs/serving.md lists them; repeatable",
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    import logging

    from longread.server import Keys, check_installed, read_keys, serve

    check_installed()
    _check_address(options.port, options.name)
    _check_directory(options.directory)
    limits = server_limits(options.limit)
    keys, metrics_keys = (read_keys(file) if file else Keys() for file in (options.keys, options.metrics_keys))
    engine_limits = _engine_limits(options)

    from longread.engine import Engine
    from longread.loading import open_model
    from longread.server.running import listen
    from longread.server.service import Service

    listener = listen(options.host, options.port, has_keys=bool(keys))
    opened = open_model(options.model, options.device)
    name = options.name or opened.name
    opened = settle_reading(options, opened)
    _check_room(options.device_memory, engine_limits, opened.model)
    logging.getLogger("longread.server").setLevel(logging.INFO)
    with _directory(options.directory) as directory:
        engine = Engine(
            opened.model, opened.inner, directory=directory, limits=engine_limits, fingerprint=opened.fingerprint
        )
        service = Service(
            engine=engine,
            tokenizer=opened.tokenizer,
            config=opened.model.config,
            name=name,
            fingerprint=opened.fingerprint,
            device=str(opened.model.device),
            keys=keys,
            metrics_keys=metrics_keys,
            limits=limits,
            keep_line_ends=options.keep_line_ends,
            learn=opened.learns,
            reuse=options.reuse,
            scratch=directory / "passing",
        )
        serve(service, listener)
    return 0


@contextlib.contextmanager
def _directory(given: str | None) -> Iterator[Path]:
    """Where sessions are kept: for good, or as long as the server runs."""
    if given is not None:
        from longread.files import close_to_others

        close_to_others(Path(given))
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="longread-") as passing:
        yield Path(passing)


def _check_address(port: int, name: str | None) -> None:
    """Refuses what the operating system would make another port of, and a name that no request could give."""
    from longread.config import UserError

    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; give 1 to 65535, or 0 for a free one")
    if name is not None and not (name.strip() == name and name.isprintable() and 0 < len(name) <= 200):
        raise UserError(f"--name is {name!r}; give 1 to 200 printable characters, with no space at either end")


def _check_directory(given: str | None) -> None:
    """Refuses a directory that holds other things: a server would put its files among them."""
    from longread.config import UserError

    if given is None:
        return
    try:
        names = {path.name for path in Path(given).iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise UserError(f"--directory {given} is no directory; give a new name, or a server's directory") from None
    except OSError as error:
        raise UserError(f"cannot read --directory {given}: {error.strerror}; give another") from None
    others = sorted(name for name in names if not name.startswith(".") and name != "lost+found")
    if others and "sessions" not in names:
        raise UserError(
            f"--directory {given} holds other things, {others[0]} for one; give a new name, or a server's directory"
        )


def _check_room(gibibytes: float | None, limits: Limits, model: Transformer) -> None:
    from longread.config import UserError
    from longread.engine import least_device_bytes

    least = least_device_bytes(model)
    if limits.device_bytes is not None and limits.device_bytes < least:
        raise UserError(
            f"--device-memory is {gibibytes:g} GiB; one session of this model and the place where it writes "
            f"need {math.ceil(least / 2**30 * 1000) / 1000:g}, so allow at least that"
        )


def server_limits(settings: list[str]) -> ServerLimits:
    """The limits of `--limit`. Raises `UserError` for a name that there is not, or a value that is no number."""
    import dataclasses

    from longread.config import UserError
    from longread.server import ServerLimits

    names = [field.name for field in dataclasses.fields(ServerLimits)]
    whole = {field.name for field in dataclasses.fields(ServerLimits) if "int" in str(field.type)}
    values: dict[str, float] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in names:
            raise UserError(f"--limit {name}: there is no such limit; there are {', '.join(names)}")
        try:
            values[name] = int(value) if name in whole else float(value)
        except ValueError:
            raise UserError(f"--limit {setting}: {value!r} is not a number; write {name}=100") from None
    return ServerLimits(**values)  # type: ignore[arg-type]


def _engine_limits(options: argparse.Namespace) -> Limits:
    from longread.config import UserError
    from longread.engine import Limits

    found = {}
    for option, field in (("device_memory", "device_bytes"), ("host_memory", "host_bytes"), ("disk", "disk_bytes")):
        gibibytes = getattr(options, option)
        if gibibytes is not None and not 0 < gibibytes < 2**30:
            raise UserError(f"--{option.replace('_', '-')} is {gibibytes:g}; give GiB, above 0 and below {2**30}")
        found[field] = None if gibibytes is None else int(gibibytes * 2**30)
    return Limits(
        **found,
        max_sessions=options.max_sessions,
        max_batch=options.max_batch,
        max_waiting=options.max_waiting,
        batch_invariant=options.batch_invariant or None,
    )
