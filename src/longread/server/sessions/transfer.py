"""Sessions as files that leave the server and come back."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from longread.config import UserError
from longread.engine import Busy, TooLarge
from longread.files import owner_only
from longread.server.catalog import TheCatalog
from longread.server.errors import ApiError, without_paths
from longread.server.schemas import REPLIES
from longread.server.service import CHECKED_QUERY, Service, Tenant, TheService
from longread.server.sessions.schemas import Label, SessionObject

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], responses=REPLIES, dependencies=[CHECKED_QUERY])

_BINARY: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.get("/{session}/file", response_class=FileResponse, responses={200: {"content": _BINARY}})
async def download(session: str, service: TheService, catalog: TheCatalog, tenant: Tenant) -> FileResponse:
    """The session as a file, which any Longread with the same model can restore."""
    await catalog.get(tenant, session)
    path = service.scratch / f"{secrets.token_hex(16)}.download"
    async with catalog.turn(f"export of {session}"):
        exported = await service.run(service.engine.export, session)
        await service.run(exported.replace, path)
    name = f"session-{session[:8]}.safetensors"
    return _Passing(path, media_type="application/octet-stream", filename=name)


class _Passing(FileResponse):
    """A file that is gone once it has been sent, however that ended.

    Always the whole: parts that are asked for one after another would be parts of different states.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in (b"range", b"if-range")]
        self.headers["accept-ranges"] = "none"
        try:
            await super().__call__(scope | {"headers": headers}, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)


@router.post(
    "/restore",
    status_code=201,
    response_model=SessionObject,
    openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
)
async def restore(
    request: Request,
    service: TheService,
    catalog: TheCatalog,
    tenant: Tenant,
    label: Annotated[Label, Query()] = "",
) -> dict[str, Any]:
    """A new session from a file that was downloaded before, here or elsewhere."""
    async with _received(service, request) as path:
        try:
            return (await catalog.restore(tenant, path, label)).shown()
        except (Busy, TooLarge):
            raise
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            reason = without_paths(str(error).partition("; ")[0], service.directories)
            remedy = "send one that GET /v1/sessions/{id}/file of a server with this model gave"
            raise ApiError(400, f"{reason}; {remedy}") from None


@contextlib.asynccontextmanager
async def _received(service: Service, request: Request) -> AsyncIterator[Path]:
    """The body in a file of its own, for as long as it is needed; its name owes nothing to the client."""
    path = service.scratch / f"{secrets.token_hex(16)}.upload"
    try:
        with open(path, "xb", opener=owner_only) as file:
            async for block in request.stream():
                await service.run(file.write, block)
        yield path
    except OSError as error:
        raise ApiError(503, f"the file cannot be kept: {error.strerror}; try again later", retry_after=60) from None
    finally:
        path.unlink(missing_ok=True)
