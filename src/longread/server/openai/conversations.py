"""/v1/conversations: items that responses are added to, one after the other."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter

from longread.server.catalog import TheCatalog
from longread.server.errors import ApiError
from longread.server.openai.bodies import ConversationRequest, ConversationUpdate, ItemsRequest
from longread.server.openai.history import StoredConversation
from longread.server.openai.objects import conversation_object, item_of, new_id, page_of
from longread.server.openai.responses import After, Count
from longread.server.openai.stored import TheResponses
from longread.server.schemas import REPLIES
from longread.server.service import CHECKED_QUERY, Tenant, TheService

router = APIRouter(prefix="/v1/conversations", tags=["OpenAI"], responses=REPLIES, dependencies=[CHECKED_QUERY])


@router.post("")
async def create(responses: TheResponses, tenant: Tenant, body: ConversationRequest | None = None) -> dict[str, Any]:
    """A new conversation, with items or without."""
    body = body or ConversationRequest()
    conversation = StoredConversation(new_id("conv"), tenant, int(time.time()), body.metadata or {})
    await responses.start(conversation, [item_of(item) for item in body.items or ()])
    return conversation_object(conversation)


@router.get("/{conversation}")
async def retrieve(conversation: str, responses: TheResponses, tenant: Tenant) -> dict[str, Any]:
    """A conversation."""
    return conversation_object(await responses.conversation(tenant, conversation))


@router.post("/{conversation}")
async def update(
    conversation: str, body: ConversationUpdate, service: TheService, responses: TheResponses, tenant: Tenant
) -> dict[str, Any]:
    """Changes what is noted of a conversation."""
    await responses.conversation(tenant, conversation)
    await service.run(responses.history.describe, conversation, body.metadata or {})
    return conversation_object(await responses.conversation(tenant, conversation))


@router.delete("/{conversation}")
async def delete(
    conversation: str, service: TheService, catalog: TheCatalog, responses: TheResponses, tenant: Tenant
) -> dict[str, Any]:
    """Forgets a conversation and its items; its responses stay."""
    async with catalog.turn(conversation):
        await responses.conversation(tenant, conversation)
        await service.run(responses.history.end, conversation)
    return {"id": conversation, "object": "conversation.deleted", "deleted": True}


@router.get("/{conversation}/items")
async def items(
    conversation: str,
    service: TheService,
    responses: TheResponses,
    tenant: Tenant,
    after: After = None,
    limit: Count = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """What has been said in a conversation."""
    await responses.conversation(tenant, conversation)
    found = await service.run(responses.history.items, conversation)
    return page_of(found, after=after, limit=limit, order=order)


@router.post("/{conversation}/items")
async def add_items(
    conversation: str,
    body: ItemsRequest,
    service: TheService,
    catalog: TheCatalog,
    responses: TheResponses,
    tenant: Tenant,
) -> dict[str, Any]:
    """Puts items at the end of a conversation; the next response reads them."""
    added = [item_of(item) for item in body.items]
    async with catalog.turn(conversation):
        await responses.conversation(tenant, conversation)
        await service.run(responses.history.append, conversation, added)
    return page_of(added, after=None, limit=len(added), order="asc")


@router.get("/{conversation}/items/{item}")
async def retrieve_item(
    conversation: str, item: str, service: TheService, responses: TheResponses, tenant: Tenant
) -> dict[str, Any]:
    """One item."""
    await responses.conversation(tenant, conversation)
    for found in await service.run(responses.history.items, conversation):
        if found["id"] == item:
            return found
    raise _no_item()


@router.delete("/{conversation}/items/{item}")
async def delete_item(
    conversation: str, item: str, service: TheService, catalog: TheCatalog, responses: TheResponses, tenant: Tenant
) -> dict[str, Any]:
    """Takes an item out; what was said after it is read again by the next response, as nothing can be unread."""
    async with catalog.turn(conversation):
        found = await responses.conversation(tenant, conversation)
        if not await service.run(responses.history.take_out, conversation, item):
            raise _no_item()
    return conversation_object(found)


def _no_item() -> ApiError:
    message = "there is no such item; list them with GET /v1/conversations/{id}/items"
    return ApiError(404, message, code="item_not_found")
