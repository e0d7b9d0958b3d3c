"""/v1/responses: every response is a session that can be gone on from, and branched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from longread.server.catalog import TheCatalog
from longread.server.errors import ApiError
from longread.server.openai.bodies import CountRequest, ResponseRequest
from longread.server.openai.making import ResponseRun, past_of
from longread.server.openai.objects import MOST_ITEMS, page_of
from longread.server.openai.stored import TheResponses
from longread.server.schemas import REPLIES, STREAM_OF_OBJECTS
from longread.server.service import CHECKED_QUERY, Service, Tenant, TheService
from longread.server.stream import streamed

router = APIRouter(prefix="/v1/responses", tags=["OpenAI"], responses=REPLIES, dependencies=[CHECKED_QUERY])

After = Annotated[str | None, Query(max_length=100)]
Count = Annotated[int, Query(ge=1, le=MOST_ITEMS)]


@router.post("", responses={200: STREAM_OF_OBJECTS}, response_model=None)
async def respond(
    body: ResponseRequest,
    request: Request,
    service: TheService,
    catalog: TheCatalog,
    responses: TheResponses,
    tenant: Tenant,
) -> Response | dict[str, Any]:
    """Answers a conversation, or one more turn of it; the model is no chat model."""
    _check_model(service, body.model)
    run = ResponseRun(service, catalog, responses, tenant, body)
    return await streamed(run.streamed(request)) if body.stream else await run.whole(request)


@router.post("/input_tokens")
async def count(body: CountRequest, service: TheService, responses: TheResponses, tenant: Tenant) -> dict[str, Any]:
    """How many tokens a response would have before its answer, those of earlier turns among them."""
    _check_model(service, body.model)
    past = await past_of(responses, service, tenant, body)
    prompt = await service.run(past.prompt, service, body)
    return {"object": "response.input_tokens", "input_tokens": prompt.position + len(prompt.ids)}


@router.get("/{response}")
async def retrieve(response: str, responses: TheResponses, tenant: Tenant, stream: bool = False) -> dict[str, Any]:
    """A response that was kept."""
    if stream:
        message = "stream is true; a response is kept whole, so leave it out"
        raise ApiError(400, message, param="stream", code="unsupported_value")
    return (await responses.get(tenant, response)).body


@router.delete("/{response}")
async def delete(response: str, responses: TheResponses, tenant: Tenant) -> dict[str, Any]:
    """Forgets a response and its session; those that went on from it stay."""
    await responses.delete(await responses.get(tenant, response))
    return {"id": response, "object": "response", "deleted": True}


@router.get("/{response}/input_items")
async def input_items(
    response: str,
    responses: TheResponses,
    tenant: Tenant,
    after: After = None,
    limit: Count = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """What was given to a response; not what it went on from."""
    found = await responses.get(tenant, response)
    return page_of(found.items, after=after, limit=limit, order=order)


def _check_model(service: Service, model: str | None) -> None:
    if model is not None:
        service.check_model(model)
