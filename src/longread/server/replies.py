"""What every route may answer besides success, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class ErrorBody(BaseModel):
    """What is wrong."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Any answer other than success."""

    error: ErrorBody


_REASONS = {
    400: "The request is wrong.",
    401: "No key, or an unknown one.",
    403: "Not from here.",
    404: "There is no such thing, or it belongs to somebody else.",
    408: "The body did not come in time.",
    409: "The session is at another position.",
    413: "More than is allowed.",
    415: "Not the type of content that is read here.",
    429: "Too much at once; wait as long as Retry-After says.",
    500: "The server failed.",
    503: "No room now, or the server is stopping; wait as long as Retry-After says.",
    504: "The request took longer than is allowed.",
}
REPLIES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": reason} for status, reason in _REASONS.items()
}
# FastAPI describes a checker's answer of its own, which this server never gives
REPLIES[422] = {"model": ErrorReply, "description": "Not used; a wrong request is answered with 400."}
_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
STREAM: dict[str, Any] = {
    "description": "The answer, or with `stream` a stream of server-sent events.",
    "content": {"text/event-stream": {"schema": _EVENT}},
}
STREAM_OF_OBJECTS: dict[str, Any] = STREAM | {
    "content": STREAM["content"] | {"application/json": {"schema": {"type": "object"}}}
}
