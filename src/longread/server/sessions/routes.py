"""/v1/sessions: texts that are read once and asked many times."""

from __future__ import annotations

from email.message import Message
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from longread.data import NotText, TextFormat, decode_text
from longread.server.catalog import Catalog, TheCatalog
from longread.server.choices import sampling_of, stops_of
from longread.server.errors import ApiError
from longread.server.schemas import REPLIES, STREAM
from longread.server.service import CHECKED_QUERY, Service, Tenant, TheService, Work
from longread.server.sessions import readings, writing
from longread.server.sessions.losses import kept
from longread.server.sessions.readings import STREAM_BIN, SessionReading
from longread.server.sessions.schemas import (
    AppendRequest,
    Bin,
    CompareRequest,
    Comparison,
    ContinuationObject,
    CreateRequest,
    Deleted,
    ForkRequest,
    GenerateRequest,
    LossesObject,
    Passage,
    Position,
    ReadingObject,
    ScoreRequest,
    SessionList,
    SessionObject,
    UpdateRequest,
)
from longread.server.sessions.writing import SessionWriting
from longread.server.stream import streamed

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], responses=REPLIES, dependencies=[CHECKED_QUERY])


@router.post("", status_code=201, response_model=SessionObject)
async def create(catalog: TheCatalog, tenant: Tenant, body: CreateRequest | None = None) -> dict[str, Any]:
    """A new session that has read nothing."""
    body = body or CreateRequest()
    entry = await catalog.create(tenant, label=body.label, learn=body.learn, compare=body.compare)
    return entry.shown()


@router.get("", response_model=SessionList)
async def list_all(catalog: TheCatalog, tenant: Tenant) -> dict[str, Any]:
    """All sessions of the tenant, the most recently used first."""
    return {"data": [entry.shown() for entry in await catalog.all(tenant)], "lost": catalog.lost(tenant)}


@router.post("/compare", response_model=Comparison)
async def compare(
    body: CompareRequest, request: Request, service: TheService, catalog: TheCatalog, tenant: Tenant
) -> dict[str, Any]:
    """What two sessions make of the same text; neither is changed."""
    first, second = (_reading(service, catalog, tenant, session, body, keep=False) for session in body.sessions)
    async with Work(service, request) as work:
        found = [await readings.whole(first, work), await readings.whole(second, work)]
    a, b = found[0]["nll"], found[1]["nll"]
    return {"readings": found, "difference": None if a is None or b is None else a - b}


@router.get("/{session}", response_model=SessionObject)
async def get(session: str, catalog: TheCatalog, tenant: Tenant) -> dict[str, Any]:
    """One session."""
    return (await catalog.get(tenant, session)).shown()


@router.get("/{session}/losses", response_model=LossesObject)
async def losses(session: str, catalog: TheCatalog, tenant: Tenant) -> dict[str, Any]:
    """Mean losses of all that the session has read, in at most 512 bins."""
    return {"session": session, **kept(*await catalog.losses(tenant, session))}


@router.patch("/{session}", response_model=SessionObject)
async def update(session: str, body: UpdateRequest, catalog: TheCatalog, tenant: Tenant) -> dict[str, Any]:
    """Renames a session, or lets it learn or not."""
    return (await catalog.update(tenant, session, label=body.label, learn=body.learn)).shown()


@router.delete("/{session}", response_model=Deleted)
async def delete(session: str, catalog: TheCatalog, tenant: Tenant) -> dict[str, Any]:
    """Forgets a session and removes its files."""
    await catalog.delete(tenant, session)
    return {"id": session, "object": "session", "deleted": True}


@router.post("/{session}/fork", status_code=201, response_model=SessionObject)
async def fork(session: str, catalog: TheCatalog, tenant: Tenant, body: ForkRequest | None = None) -> dict[str, Any]:
    """Another session that has read the same."""
    return (await catalog.fork(tenant, session, None if body is None else body.label)).shown()


@router.post("/{session}/save", response_model=SessionObject)
async def save(session: str, service: TheService, catalog: TheCatalog, tenant: Tenant) -> dict[str, Any]:
    """Writes the whole session to the server's disk now."""
    await catalog.get(tenant, session)
    await service.run(service.engine.save, session)
    return (await catalog.get(tenant, session)).shown()


@router.post("/{session}/cancel", response_model=SessionObject)
async def cancel(session: str, catalog: TheCatalog, tenant: Tenant) -> dict[str, Any]:
    """Ends what the session is reading or writing, at the next mini-batch or token."""
    await catalog.get(tenant, session)
    catalog.cancel(session)
    return (await catalog.get(tenant, session)).shown()


@router.post("/{session}/append", response_model=ReadingObject, responses={200: STREAM})
async def append(
    session: str, body: AppendRequest, request: Request, service: TheService, catalog: TheCatalog, tenant: Tenant
) -> Any:
    """Reads more of the text. Unless it streams it is finished even if the client goes away."""
    reading = _reading(service, catalog, tenant, session, body, keep=True)
    return await _answer(service, request, reading, stream=body.stream)


@router.post(
    "/{session}/append/file",
    response_model=ReadingObject,
    responses={200: STREAM},
    openapi_extra={"requestBody": {"required": True, "content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def append_file(
    session: str,
    request: Request,
    service: TheService,
    catalog: TheCatalog,
    tenant: Tenant,
    expected_position: Annotated[Position | None, Query(strict=False)] = None,
    skip: Annotated[Position, Query(strict=False)] = 0,
    bin_size: Annotated[Bin | None, Query(alias="bin")] = None,
    stream: bool = False,
) -> Any:
    """Reads a file, which is the body: text in UTF-8, or as its byte order mark or the charset of its type says."""
    kind = request.headers.get("content-type", "").lower()
    if kind.startswith(("multipart/", "application/x-www-form-urlencoded", "application/json")):
        raise ApiError(415, f"{kind.partition(';')[0]} is not read here; send the text itself as text/plain")
    charset = Message()
    charset["content-type"] = kind
    text_format = TextFormat(charset.get_content_charset(), keep_line_ends=True, markup=kind.startswith("text/html"))
    try:
        text = "".join(decode_text([await request.body()], text_format))
    except NotText as error:
        raise ApiError(
            400, f"the file {error.reason}; send plain text, and name its charset in Content-Type if it is not UTF-8"
        ) from None
    body = AppendRequest(text=text, bin=bin_size, expected_position=expected_position, skip=skip, stream=stream)
    reading = _reading(service, catalog, tenant, session, body, keep=True)
    return await _answer(service, request, reading, stream=stream)


@router.post("/{session}/score", response_model=ReadingObject, responses={200: STREAM})
async def score(
    session: str, body: ScoreRequest, request: Request, service: TheService, catalog: TheCatalog, tenant: Tenant
) -> Any:
    """What the session would make of a text; it stays as it is."""
    reading = _reading(service, catalog, tenant, session, body, keep=False)
    return await _answer(service, request, reading, stream=body.stream)


@router.post("/{session}/generate", response_model=ContinuationObject, responses={200: STREAM})
async def generate(
    session: str, body: GenerateRequest, request: Request, service: TheService, catalog: TheCatalog, tenant: Tenant
) -> Any:
    """Continues the text; what the session writes it has also read."""
    service.check_amount(body.max_tokens)
    sampling = sampling_of(service, body, body.max_tokens, body.logprobs or 0)
    stops = stops_of(body.stop)
    one = SessionWriting(service, catalog, tenant, session, sampling, stops, logprobs=body.logprobs is not None)
    work = Work(service, request)
    if body.stream:
        return await streamed(writing.watched(one, work))
    return await writing.whole(one, work)


def _reading(
    service: Service,
    catalog: Catalog,
    tenant: str,
    session: str,
    body: Passage,
    *,
    keep: bool,
) -> SessionReading:
    stream = isinstance(body, ScoreRequest) and body.stream
    append = body if isinstance(body, AppendRequest) else None
    return SessionReading(
        service,
        catalog,
        tenant,
        session,
        text=body.text,
        tokens=body.tokens,
        keep=keep,
        expected_position=None if append is None else append.expected_position,
        skip=0 if append is None else append.skip,
        bin_size=STREAM_BIN if stream and body.bin is None else body.bin,
    )


async def _answer(
    service: Service, request: Request, reading: SessionReading, *, stream: bool
) -> Response | dict[str, Any]:
    if stream:
        return await streamed(readings.watched(reading, Work(service, request)))
    async with Work(service, request, survives=reading.keep) as work:
        return await readings.whole(reading, work)
