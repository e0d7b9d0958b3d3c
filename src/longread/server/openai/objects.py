"""Responses, their items and their events, as they are sent."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from longread.server.errors import ApiError
from longread.server.openai.bodies import InputItem, ResponseRequest
from longread.server.openai.history import StoredConversation
from longread.server.stream import Event

Json = dict[str, Any]
MOST_ITEMS = 100
"""Of one page of a list."""


def new_id(kind: str) -> str:
    """An id that nobody else has: "msg", "conv" or "resp"."""
    return f"{kind}_{secrets.token_hex(16)}"


def item_of(message: InputItem) -> Json:
    """A message that was given, as an item of a list."""
    part = output_text(message.text) if message.role == "assistant" else {"type": "input_text", "text": message.text}
    return {
        "id": new_id("msg"),
        "type": "message",
        "status": "completed",
        "role": message.role,
        "content": [part],
    }


def output_text(text: str, logprobs: Sequence[Json] = ()) -> Json:
    """What the assistant said."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def output_message(item_id: str, status: str, content: Sequence[Json]) -> Json:
    """The message that is the output."""
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": list(content)}


def conversation_object(conversation: StoredConversation) -> Json:
    """A conversation."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created,
        "metadata": conversation.metadata,
    }


def page_of(items: Sequence[Json], *, after: str | None, limit: int, order: str) -> Json:
    """Some of a list, which is given oldest first: those after the item `after`, in the order asked for.

    Raises `ApiError` if there is no such item.
    """
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise ApiError(
                400, f"after is {after!r}, which is no item of this list; give one of its ids", param="after"
            )
        ordered = ordered[ids.index(after) + 1 :]
    found = ordered[:limit]
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": len(ordered) > len(found),
    }


class ResponseObject:
    """One response from its beginning to its end.

    Args:
        response_id: of it.
        body: the request.
        model: which answers it.
    """

    def __init__(self, response_id: str, body: ResponseRequest, model: str) -> None:
        self._item = new_id("msg")
        self._numbers = itertools.count()
        self._open = False
        self.fields: Json = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }
        if body.conversation_id is not None:
            self.fields["conversation"] = {"id": body.conversation_id}

    def begin(self) -> Iterator[Event]:
        """Nothing has been read yet."""
        yield self._event("response.created", response=dict(self.fields))
        yield self._event("response.in_progress", response=dict(self.fields))

    def delta(self, text: str, logprobs: Sequence[Json]) -> Iterator[Event]:
        """More of the text, and its item before the first of it."""
        yield from self._opened()
        yield self._of_part("response.output_text.delta", delta=text, logprobs=list(logprobs))

    def end(self, text: str, logprobs: Sequence[Json]) -> Iterator[Event]:
        """The item is whole; the response is, once `finish` has been called."""
        yield from self._opened()
        part = output_text(text, logprobs)
        yield self._of_part("response.output_text.done", text=text, logprobs=list(logprobs))
        yield self._of_part("response.content_part.done", part=part)

    def finish(self, text: str, logprobs: Sequence[Json], reason: str, usage: Json) -> None:
        """Sets what is known at the end; the text ended at a stop, or because it was long enough."""
        status = "completed" if reason == "stop" else "incomplete"
        self.fields |= {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "output": [output_message(self._item, status, [output_text(text, logprobs)])],
            "usage": usage,
        }

    def finished(self) -> Iterator[Event]:
        """The last events."""
        yield self._event("response.output_item.done", output_index=0, item=self.fields["output"][0])
        yield self._event(f"response.{self.fields['status']}", response=dict(self.fields))

    def failed(self, message: str, code: str) -> Event:
        """The last event of a response that nothing came of."""
        error = {"code": code, "message": message}
        return self._event("response.failed", response=self.fields | {"status": "failed", "error": error})

    def _opened(self) -> Iterator[Event]:
        if not self._open:
            self._open = True
            item = output_message(self._item, "in_progress", [])
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._of_part("response.content_part.added", part=output_text(""))

    def _of_part(self, kind: str, **more: Any) -> Event:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> Event:
        return kind, {"type": kind, "sequence_number": next(self._numbers), **more}


def usage_of(read: int, cached: int, written: int, *, kept: bool) -> Json:
    """OpenAI's account of a response.

    Args:
        read: tokens before the answer, those of earlier turns among them.
        cached: those that had been read before, and were not again.
        written: tokens of the answer.
        kept: whether what was read is there to be gone on from.
    """
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": (read - cached) if kept else 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }
