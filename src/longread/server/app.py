"""The application: all routes behind one gate."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from longread import __version__
from longread.server import about, chat, completions, errors, sessions, transfer
from longread.server.catalog import Catalog
from longread.server.gate import Gate
from longread.server.log import logger
from longread.server.openai import conversations as conversation_routes, responses as response_routes
from longread.server.openai.stored import Responses
from longread.server.service import Service
from longread.server.static import page_router


def create_app(service: Service) -> FastAPI:
    """An ASGI application that serves one model. Shutting it down closes the engine, which saves all sessions."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.run(service.tidy)
        await service.run(responses.remove_orphans)
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
    responses = Responses(service, catalog)
    app.state.service, app.state.catalog, app.state.responses = service, catalog, responses
    errors.install(app)
    app.add_middleware(Gate, service=service)
    app.include_router(page_router())
    for module in (about, completions, chat, response_routes, conversation_routes, transfer, sessions):
        app.include_router(module.router)
    return app
