"""The application: all routes behind one gate, and the page's files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib import resources

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from longread import __version__
from longread.server import about, errors
from longread.server.access import Gate
from longread.server.catalog import Catalog
from longread.server.errors import ApiError, logger
from longread.server.openai import completions, conversations, responses
from longread.server.openai.stored import Responses
from longread.server.service import Service
from longread.server.sessions import routes as sessions, transfer

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "json": "application/json",
}
INDEX = "index.html"


def create_app(service: Service) -> FastAPI:
    """An ASGI application that serves one model. Shutting it down closes the engine, which saves all sessions."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.run(service.tidy)
        await service.run(kept.remove_orphans)
        for lost in service.engine.lost:
            logger.warning("session %s was at %d and is at %d: %s", lost.id, lost.position, lost.restored, lost.reason)
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="Longread",
        version=__version__,
        summary="Language models that keep learning while they read.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # these two load scripts from elsewhere
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    catalog = Catalog(service)
    kept = Responses(service, catalog)
    app.state.service, app.state.catalog, app.state.responses = service, catalog, kept
    errors.install(app)
    app.add_middleware(Gate, service=service)
    routers = [module.router for module in (about, completions, responses, conversations, transfer, sessions)]
    for router in (_page_router(), *routers):  # `include_router` builds every route anew, in the first request
        app.router.routes += router.routes
    return app


def _page_router() -> APIRouter:
    """Routes to the page as it lies in the package, read once; nothing else of the disk can be asked for."""
    router = APIRouter(include_in_schema=False)
    files = {
        file.name: (file.read_bytes(), _TYPES[file.name.rpartition(".")[2]])
        for file in resources.files("longread.server").joinpath("page").iterdir()
        if file.is_file() and file.name.rpartition(".")[2] in _TYPES
    }

    def answer(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "the page has no such file")
        content, kind = files[name]
        return Response(content, media_type=kind)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        return answer(INDEX)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(name: str) -> Response:
        return answer(name or INDEX)

    return router
