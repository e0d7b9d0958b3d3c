"""Query parameters, checked as strictly as bodies: a slip, or a second value, would change what a request does."""

from __future__ import annotations

from urllib.parse import parse_qsl

from fastapi import Depends, Request

from longread.server.errors import ApiError


def _check(request: Request) -> None:
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    try:
        query = request.scope["query_string"].decode("ascii")
        names = [name for name, _ in parse_qsl(query, keep_blank_values=True, errors="strict")]
    except UnicodeDecodeError:
        raise ApiError(400, "the query is not UTF-8 in percent-encoding; encode it so") from None
    for name in names:
        if name not in known:
            remedy = f"there are {', '.join(known)}" if known else "there are none"
            raise ApiError(400, f"there is no query parameter {name[:60]!r} here; {remedy}", code="unknown_parameter")
        if names.count(name) > 1:
            raise ApiError(400, f"the query parameter {name} is given {names.count(name)} times; give it once")


CHECKED_QUERY = Depends(_check)
"""For the routes of a router."""
