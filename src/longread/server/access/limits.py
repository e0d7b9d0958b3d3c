"""What one tenant, and one request, may take of the server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from longread.config import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLimits:
    """Of each tenant and each request; the engine has limits of its own, for all tenants together."""

    body_bytes: int = 32 * 2**20
    """Of one request body; a session file has `session_file_bytes`."""
    session_file_bytes: int = 16 * 2**30
    """Of one session that is uploaded."""
    tokens: int = 2**22
    """That one request may make the model read or write, all its prompts and choices together."""
    choices: int = 128
    """Prompts of one completion request, times `n`."""
    seconds: float = 3600.0
    """That one request may take; what has been read by then stays read."""
    stall_seconds: float = 60.0
    """That a client may go without sending what it announced, or without taking what it asked for."""
    concurrent: int = 32
    """Requests of one tenant at a time."""
    per_minute: int = 6000
    """Requests of one tenant in a minute; a minute's worth may come at once."""
    sessions: int = 1000
    """Sessions of one tenant; a frozen twin counts."""
    tenant_bytes: int | None = None
    """State of all sessions of one tenant together; None: what the engine has."""
    responses: int = 1000
    """Responses of one tenant that can be gone on from; a new one takes the place of the one not used longest."""
    response_seconds: float = 30 * 86400.0
    """That a response or a conversation is kept without being used."""
    conversations: int = 1000
    """Of one tenant."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{field.name} is {value}; it must be positive and finite")
