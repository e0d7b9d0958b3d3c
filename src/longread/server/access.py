"""Access to the server: whose a request is, how many and how large requests may be, and how long one may stand still.

One ASGI middleware around everything else, so that no route can be reached past it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Any

from longread.server.errors import ApiError, logger, stopping
from longread.server.service import Service
from longread.server.tenants import LOCAL

HEALTH = "/health"
METRICS = "/metrics"
PAGE = "/page/"
RESTORE = "/v1/sessions/restore"
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE | re.ASCII)
"""What `Host` may be without keys."""
_ONCE = {"authorization", "content-length", "content-type", "host", "origin", "transfer-encoding"}
_CLOSE = {"Connection": "close"}
_RETRY_CONCURRENT = 1.0


class Gate:
    """Lets a request through to the application, or answers it itself."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service
        self._local = not service.keys
        self._buckets: dict[str, _Bucket] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":  # every route that answers GET answers it, without the body
            scope = scope | {"method": "GET"}
        exchange = _Exchange(self._service, scope, receive, send, method)
        meters, tenant = self._service.meters, None
        with meters.under_way.track_inprogress():
            try:
                tenant = self._admitted(scope)
                await self._app(scope, exchange.receive, exchange.send)
            except ApiError as error:
                meters.refused.labels(error.body["error"]["code"]).inc()
                await exchange.answer(error)
            except OSError:  # the client takes nothing any more: there is nobody to answer
                exchange.status = exchange.status or 499
            except Exception:
                logger.exception("request %s failed", exchange.id)
                await exchange.answer(ApiError(500, "something went wrong inside the server; its log says what"))
            finally:
                if tenant is not None:
                    self._service.requests[tenant] -= 1
                exchange.count()

    def _admitted(self, scope: Any) -> str | None:
        """Whose request this is, now counted as under way; None if it is anybody's. Raises `ApiError` to refuse."""
        service, headers = self._service, _headers(scope)
        _check_framing(scope, headers)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "compressed bodies are not read here; send it without Content-Encoding", headers=_CLOSE)
        if self._local:
            _check_local(headers)
        if _is_open(scope["path"], scope["method"]):
            return None
        tenant = self._tenant(headers, scope["path"])
        limits = service.limits
        if service.stopping:
            raise stopping("try again in a moment")
        bucket = self._buckets.setdefault(tenant, _Bucket(limits.per_minute))
        if wait := bucket.wait():
            raise ApiError(429, f"more than {limits.per_minute} requests a minute; wait", retry_after=wait)
        if service.requests[tenant] >= limits.concurrent:
            message = f"{limits.concurrent} requests are under way already, as many as may be; wait for one to end"
            raise ApiError(429, message, retry_after=_RETRY_CONCURRENT)
        _check_length(headers, _most_bytes(service, scope["path"]))
        scope["longread.tenant"] = tenant
        service.requests[tenant] += 1
        return tenant

    def _tenant(self, headers: dict[str, str], path: str) -> str:
        """Whose key was sent; who may ask for numbers is no tenant, but has the limits of one."""
        apart = path == METRICS and bool(self._service.metrics_keys)
        if self._local and not apart:
            return LOCAL
        keys = self._service.metrics_keys if apart else self._service.keys
        scheme, _, key = headers.get("authorization", "").partition(" ")
        name = keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            wanted = f"a key of {METRICS}, which are apart from API keys" if apart else "an API key that it knows"
            raise ApiError(401, f"this server wants {wanted}; send it as Authorization: Bearer KEY")
        return f"{METRICS} {name}" if apart else name


class _Exchange:
    """One request on its way through: its body is counted, its waiting is timed, its answer is noted."""

    def __init__(self, service: Service, scope: Any, receive: Any, send: Any, method: str) -> None:
        self._service, self._scope, self._receive, self._send = service, scope, receive, send
        self._method = method
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
        elif self._method == "HEAD":
            message = message | {"body": b""}
        try:
            await asyncio.wait_for(self._send(message), self._service.limits.stall_seconds)
        except TimeoutError:
            raise OSError("the client takes nothing any more") from None

    async def answer(self, error: ApiError) -> None:
        if self.status is None:
            await error.response()(self._scope, self._receive, self.send)

    def count(self) -> None:
        route = getattr(self._scope.get("route"), "path", "none")  # the template: an id would make a series of its own
        method = self._method if self._method in _METHODS else "other"
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
    """By their names; those that are decided by may stand there once only, or others might decide by the other."""
    found: dict[str, str] = {}
    for raw_name, value in scope["headers"]:
        name = raw_name.decode("latin-1").lower()
        if name in found and name in _ONCE:
            raise ApiError(400, f"there are several headers {name}; send one", headers=_CLOSE)
        found[name] = value.decode("latin-1")
    return found


def _check_framing(scope: Any, headers: dict[str, str]) -> None:
    """Refuses a request whose end a proxy might see elsewhere: what follows would be taken for another request."""
    if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
        message = "the request says in two ways how long it is; send Content-Length or Transfer-Encoding: chunked"
        raise ApiError(400, message, headers=_CLOSE)


def _is_open(path: str, method: str) -> bool:
    return method == "GET" and (path in ("/", HEALTH) or path.startswith(PAGE))


def _check_local(headers: dict[str, str]) -> None:
    """Without keys the only protection is that nobody else reaches us; a browser must not be led here by a page
    from elsewhere, neither under our name (Origin) nor under its own (DNS rebinding: Host)."""
    host = headers.get("host", "")
    if not _LOOPBACK.fullmatch(host):
        raise ApiError(403, "this server has no keys and answers to localhost only; give it keys to reach it by name")
    if headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
        raise ApiError(403, "this server has no keys and answers no page from elsewhere; give it keys")


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
