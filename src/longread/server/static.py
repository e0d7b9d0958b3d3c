"""The page's files, read once from the package; nothing else of the disk can be asked for."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

from longread.server.errors import ApiError

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "json": "application/json",
}
INDEX = "index.html"


def page_router() -> APIRouter:
    """Routes to the page as it lies in the package."""
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
