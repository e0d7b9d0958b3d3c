"""What goes wrong, as HTTP: one JSON shape for all of it, the one that OpenAI clients understand; and the log."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from longread.config import UserError
from longread.engine import Busy, OverQuota, TooLarge, UnknownSession, WrongPosition
from longread.server.schemas import UNSUPPORTED
from longread.server.validation import cause, explained, unknown_argument

logger = logging.getLogger("longread.server")
"""Says what the server does; never keys, texts or token ids."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "client_too_slow",
    409: "wrong_position",
    413: "too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "overloaded",
    504: "timeout",
}


class ApiError(HTTPException):
    """An answer other than success: its status, a sentence, and what else belongs to the error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(status, message, {**(headers or {}), **_headers(status, retry_after)})
        self.body = {
            "error": {
                "message": message,
                "type": _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
                "param": param,
                "code": code or _CODES.get(status),
                **more,
            }
        }

    def with_facts(self, **facts: Any) -> ApiError:
        """The same with more in the error object."""
        self.body["error"] |= facts
        return self

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status_code, dict(self.headers or {}))


def stopping(ended: str, **facts: Any) -> ApiError:
    """What to say while the server stops; on another connection, for this one ends with it."""
    message = f"the server is stopping; {ended}"
    return ApiError(503, message, code="stopping", retry_after=5, headers={"Connection": "close"}, **facts)


def without_paths(text: str, directories: Iterable[Path]) -> str:
    """A sentence that does not say where the server keeps its files, neither in `directories` nor elsewhere."""
    for directory in directories:
        text = re.sub(rf"{re.escape(str(directory))}(/[^\s:;,]*)?", "the file", text)
    return re.sub(r"(?<![\w.])/[^\s:;,'\")]+", "the file", text)


def _headers(status: int, retry_after: float | None) -> dict[str, str]:
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return headers | ({"WWW-Authenticate": "Bearer"} if status == 401 else {})


def as_api_error(error: BaseException, directories: Iterable[Path] = ()) -> ApiError:
    """Any exception as an answer. What was not foreseen says nothing about the inside of the server."""
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(503, str(error), retry_after=error.retry_after)
        case OverQuota():
            return ApiError(429, str(error), code="insufficient_quota", retry_after=60)
        case WrongPosition():
            return ApiError(409, str(error), param="expected_position", position=error.position)
        case UnknownSession():
            return ApiError(404, "there is no such session; list them with GET /v1/sessions")
        case TooLarge():
            return ApiError(413, str(error))
        case UserError(__cause__=OSError()):
            return ApiError(503, "the server's disk cannot be written; try again later", code="storage", retry_after=60)
        case UserError():
            return ApiError(400, without_paths(str(error), directories))
        case RequestValidationError():
            return _invalid(error)
        case HTTPException(status_code=404):
            return ApiError(404, "there is no such route; docs/serving.md lists them")
        case HTTPException(status_code=405):
            return ApiError(405, "this route has no such method; docs/serving.md lists them", headers=error.headers)
        case HTTPException(status_code=400):  # what FastAPI says of a body that is not even bytes of JSON
            return ApiError(400, "the body cannot be read as JSON")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
    return ApiError(500, "something went wrong inside the server; its log says what")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request."""
    errors = error.errors()
    if isinstance(error.body, bytes):
        return ApiError(415, "the body is not declared as JSON; send it with Content-Type: application/json")
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON; send a JSON object")
    unknown = unknown_argument(errors)
    if unknown is not None:
        return ApiError(400, f"there is no argument {unknown}; leave it out", param=unknown, code="unknown_parameter")
    message, name = explained(errors)
    kind = cause(errors)["type"]
    return ApiError(400, message, param=name, code=kind if kind in UNSUPPORTED else None)


def install(app: FastAPI) -> None:
    """Makes the application answer in this shape whatever goes wrong."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error, request.app.state.service.directories).response()

    for kind in (UserError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
