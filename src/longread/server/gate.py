"""The door of the server: who comes in, how often, with how much, and for how long.

One ASGI middleware around everything else, so that no route can be reached past it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from typing import Any
from urllib.parse import urlsplit

from longread.server.errors import ApiError
from longread.server.keys import LOCAL
from longread.server.log import logger
from longread.server.service import Service

HEALTH = "/health"
PAGE = "/page/"
RESTORE = "/v1/sessions/restore"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_RETRY_CONCURRENT = 1.0


class Gate:
    """Lets a request through to the application, or answers it itself."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service
        self._buckets: dict[str, _Bucket] = {}
        self._under_way: defaultdict[str, int] = defaultdict(int)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(self._service, scope, receive, send)
        meters, tenant = self._service.meters, None
        with meters.under_way.track_inprogress():
            try:
                tenant = self._admitted(scope)
                await self._app(scope, passage.receive, passage.send)
            except ApiError as error:
                meters.refused.labels(error.body["error"]["code"]).inc()
                await passage.answer(error)
            except OSError:  # the client takes nothing any more: there is nobody to answer
                passage.status = passage.status or 499
            except Exception:
                logger.exception("request %s failed", passage.id)
                await passage.answer(ApiError(500, "something went wrong inside the server; its log says what"))
            finally:
                if tenant is not None:
                    self._under_way[tenant] -= 1
                passage.count()

    def _admitted(self, scope: Any) -> str | None:
        """Whose request this is, now counted as under way; None if it is anybody's. Raises `ApiError` to refuse."""
        service, headers = self._service, _headers(scope)
        if not service.keys:
            _check_local(headers)
        if _is_open(scope["path"], scope["method"]):
            return None
        tenant = self._tenant(headers)
        limits = service.limits
        if service.stopping:
            raise ApiError(503, "the server is stopping; try again in a moment", code="stopping", retry_after=5)
        bucket = self._buckets.setdefault(tenant, _Bucket(limits.per_minute))
        if wait := bucket.wait():
            raise ApiError(429, f"more than {limits.per_minute} requests a minute; wait", retry_after=wait)
        if self._under_way[tenant] >= limits.concurrent:
            message = f"{limits.concurrent} requests are under way already, as many as may be; wait for one to end"
            raise ApiError(429, message, retry_after=_RETRY_CONCURRENT)
        _check_length(headers, _most_bytes(service, scope["path"]))
        scope["longread.tenant"] = tenant
        self._under_way[tenant] += 1
        return tenant

    def _tenant(self, headers: dict[str, str]) -> str:
        if not self._service.keys:
            return LOCAL
        scheme, _, key = headers.get("authorization", "").partition(" ")
        tenant = self._service.keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise ApiError(401, "this server wants an API key that it knows; send it as Authorization: Bearer KEY")
        return tenant


class _Passage:
    """One request on its way through: its body is counted, its waiting is timed, its answer is noted."""

    def __init__(self, service: Service, scope: Any, receive: Any, send: Any) -> None:
        self._service, self._scope, self._receive, self._send = service, scope, receive, send
        self._most = _most_bytes(service, scope["path"])
        self._bytes, self._complete = 0, False
        self._started = time.perf_counter()
        self.status: int | None = None
        self.id = secrets.token_hex(8)

    async def receive(self) -> Any:
        if self._complete:  # what can still come is that the client goes, and that may take any time
            return await self._receive()
        stall = self._service.limits.stall_seconds
        try:
            message = await asyncio.wait_for(self._receive(), stall)
        except TimeoutError:
            raise ApiError(
                408, f"nothing more of the body came for {stall:g} seconds; send the request again"
            ) from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._most:
            raise _too_long(self._most)
        self._complete = not message.get("more_body", False)
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name for name, _ in message["headers"]}
            for name, value in [*_security(self._scope["path"]), (b"x-request-id", self.id.encode())]:
                if name not in names:
                    message["headers"].append((name, value))
        try:
            await asyncio.wait_for(self._send(message), self._service.limits.stall_seconds)
        except TimeoutError:
            raise OSError("the client takes nothing any more") from None

    async def answer(self, error: ApiError) -> None:
        if self.status is None:
            await error.response()(self._scope, self._receive, self.send)

    def count(self) -> None:
        route = getattr(self._scope.get("route"), "path", "none")  # the template: an id would make a series of its own
        method = self._scope["method"] if self._scope["method"] in _METHODS else "other"
        meters = self._service.meters
        meters.requests.labels(method, route, str(self.status or 499)).inc()
        meters.seconds.labels(method, route).observe(time.perf_counter() - self._started)


_METHODS = {"GET", "HEAD", "POST", "PATCH", "DELETE"}


class _Bucket:
    """Requests that may still come; it fills up again at an even pace."""

    def __init__(self, per_minute: int) -> None:
        self._rate, self._most = per_minute / 60, float(per_minute)
        self._left, self._then = self._most, time.monotonic()

    def wait(self) -> float:
        """Takes one request out; 0, or the seconds until there is one."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < 1:
            return (1 - self._left) / self._rate
        self._left -= 1
        return 0.0


def _headers(scope: Any) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _is_open(path: str, method: str) -> bool:
    return method in ("GET", "HEAD") and (path in ("/", HEALTH) or path.startswith(PAGE))


def _check_local(headers: dict[str, str]) -> None:
    """Without keys the only protection is that nobody else reaches us; a browser must not be led here by a page
    from elsewhere, neither under our name (Origin) nor under its own (DNS rebinding: Host)."""
    if _name(f"//{headers.get('host', '')}") not in _LOOPBACK:
        raise ApiError(403, "this server has no keys and answers to localhost only; give it keys to reach it by name")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers["host"]:
        raise ApiError(403, "this server has no keys and answers no page from elsewhere; give it keys")


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _most_bytes(service: Service, path: str) -> int:
    return service.limits.session_file_bytes if path == RESTORE else service.limits.body_bytes


def _check_length(headers: dict[str, str], most: int) -> None:
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_long(most)


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than {most} bytes; send it in several requests")


def _security(path: str) -> list[tuple[bytes, bytes]]:
    page = path == "/" or path.startswith(PAGE)
    policy = b"script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " if page else b""
    policy = b"default-src 'none'; " + policy + b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    if page:
        policy += b"; require-trusted-types-for 'script'; trusted-types 'none'"
    return [
        (b"content-security-policy", policy),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache" if page else b"no-store"),
    ]
