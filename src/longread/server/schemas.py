"""What all requests have in common, and what every route may answer besides success.

Every argument either has an effect, or is refused unless it asks for what is done anyway (`Only`), or is one of the few
that, here as at OpenAI, change no answer (`Hint`, `metadata`, `annotations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_before_validator_function

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Probability = Annotated[float, Field(gt=0, le=1)]
Stop = str | list[str] | None
Hint = Annotated[str, Field(max_length=10_000)] | None
"""Identifies somebody or something to whoever reads the request; no answer depends on it."""
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

UNSUPPORTED = ("unsupported_parameter", "unsupported_value")
"""OpenAI's codes for an argument, or for a value of one, that a model cannot follow."""


@dataclass(frozen=True)
class Only:
    """Annotation of an argument that is null or one of `values`, which all ask for what is done anyway.

    Args:
        reason: ends a sentence that begins with the argument and its value.
    """

    values: tuple[Any, ...]
    reason: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> Any:
        if value is not None and not any(_same(value, allowed) for allowed in self.values):
            raise PydanticCustomError(UNSUPPORTED[any(self.values)], "{reason}", {"reason": self.reason})
        return value


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it, where true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


NO_OBFUSCATION = "nothing is added to the pieces of a stream, so leave it out"
NOTHING = "nothing here can follow it, so leave it out"
NO_TOOLS = "the model calls no tools, so leave it out"
NO_CACHE = "no prompts are cached here, so leave it out"
TEXT_ONLY = "the model writes text and nothing else"


class RequestBody(BaseModel):
    """What every request body has in common: no argument goes unseen, no number is NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class WritingOptions(RequestBody):
    """How to continue a text, wherever it comes from."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Probability | None = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    seed: Seed | None = None
    stop: Stop = None


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
