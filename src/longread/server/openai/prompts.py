"""What is read for a prompt: all of it, or what a session has not read yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longread.server.openai.kept import KeptSession
from longread.server.openai.prefix import TokenPrefix
from longread.server.openai.requests import OpenAIRequest
from longread.server.openai.stored import Responses
from longread.server.service import Service


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request."""

    ids: list[int]
    """That are read."""
    session: str | None = None
    """That has read what is before them, and stays as it is."""
    position: int = 0
    """Of that session."""
    prefix: TokenPrefix | None = None
    """All that the session has read, where that is known."""


async def prompts_of(
    responses: Responses,
    service: Service,
    tenant: str,
    body: OpenAIRequest,
    encode: Callable[[bool], list[list[int]]],
    *,
    whole: bool = False,
) -> list[Prompt]:
    """The prompts of a request.

    Args:
        encode: their token ids, given whether they go on from what a session has read.
        whole: every token of them must be read.

    Raises:
        ApiError: the session that the request names is not there.
    """
    if body.session is not None:
        session, position = await responses.named(tenant, body.session)
        return [Prompt(ids, session, position) for ids in await service.run(encode, position > 0)]
    prompts = [Prompt(ids) for ids in await service.run(encode, False)]
    if whole or not service.reuses(body.reuse):
        return prompts
    return [await reusing(responses, service, tenant, prompt.ids, body.learn) for prompt in prompts]


def kept_of(
    responses: Responses, service: Service, tenant: str, body: OpenAIRequest, prompts: Sequence[Prompt]
) -> KeptSession | None:
    """The session that reads a prompt, writes and stays; None: one that ends with the request does."""
    if not (body.store and service.reuses(body.reuse) and body.session is None and len(prompts) * (body.n or 1) == 1):
        return None
    (prompt,) = prompts
    return KeptSession(
        responses, service, tenant, origin=prompt.session, prefix=prompt.prefix, learn=service.learns(body.learn)
    )


async def reusing(responses: Responses, service: Service, tenant: str, ids: list[int], learn: bool | None) -> Prompt:
    """A prompt that goes on from the session of the tenant that has read most of it, if one has."""
    found = await responses.longest(tenant, ids, service.learns(learn))
    if found is None or found.prefix is None:
        return Prompt(ids)
    position = found.prefix.position
    return Prompt(ids[position:], found.session, position, found.prefix)
