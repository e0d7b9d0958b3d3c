"""HTTP: OpenAI's routes, sessions, and a page that shows a model learning.

app.py      the application: all routes behind one gate, and the page's files
access.py   the gate around all routes: key, rate, size and time of every request; tenants.py their keys and limits
service.py  what all routes share, and what requests have under way in the engine
openai/     completions, chats, responses and conversations
sessions/   /v1/sessions
catalog.py  the sessions of tenants; choices.py what sessions write, as text in pieces; stream.py answers in pieces
errors.py   what goes wrong, as HTTP; validation.py what is wrong with a request
schemas.py  what all requests have in common
about.py    health, version, models, tokenizer, metrics
running.py  the process: binding, signals, slow clients

The packages that this needs are an extra of their own; `serve` says so if they are missing.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from longread.config import UserError
from longread.extras import install_command
from longread.server.tenants import Keys, ServerLimits, read_keys

if TYPE_CHECKING:
    from longread.server.service import Service

__all__ = ["Keys", "ServerLimits", "check_installed", "read_keys", "serve"]


def check_installed() -> None:
    """Raises `UserError` if a package that serving needs is missing."""
    try:
        import longread.server.app  # noqa: F401
        from longread.server.running import find_uvicorn

        find_uvicorn()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("longread"):
            raise
        raise UserError(f"serving needs {error.name}; run {install_command('serve')}") from None


def serve(service: Service, listener: socket.socket) -> None:
    """Serves on a socket of `running.listen` until SIGINT or SIGTERM, then lets requests end and saves all sessions."""
    from longread.server.running import run

    run(service, listener)
