"""A chat as a text that a base model can continue.

The models are trained on texts, not on chats. So a chat is put to them as a text of this form, and their answer ends
where the user would speak next:

    {system}\\n\\nUser: {content}\\n\\nAssistant: {content}\\n\\nUser: {content}\\n\\nAssistant:

A message with a `name` has that in place of its role. What an assistant said is put as it was written after
"Assistant:", with the space that it began with: so a chat that is sent again is the text that the model has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

MOST_NAMES = 4
"""Names of users, the newest, at which an answer ends as at "User"."""
BETWEEN = "\n\n"
_SPEAKERS = {"user": "User", "assistant": "Assistant"}


class Said(Protocol):
    """One message of a chat."""

    @property
    def role(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def text(self) -> str: ...


def text_of(messages: Sequence[Said], *, goes_on: bool = False) -> str:
    """The chat as a text; one that ends with words of the assistant is continued there.

    Args:
        goes_on: the messages come after an answer that the reader of the text has written.
    """
    parts = [""] if goes_on and messages else []
    for message in messages:
        speaker = message.name or _SPEAKERS.get(message.role)
        written = message.role == "assistant" and (not message.text or message.text[0].isspace())
        parts.append(f"{speaker}:{'' if written else ' '}{message.text}" if speaker else message.text)
    if messages and messages[-1].role != "assistant":
        parts.append("Assistant:")
    return BETWEEN.join(parts)


def ends_of(messages: Sequence[Said]) -> list[str]:
    """Where the answer ends: the beginnings of what a user would say next."""
    names = dict.fromkeys(message.name for message in reversed(messages) if message.role == "user" and message.name)
    return [f"{BETWEEN}{speaker}:" for speaker in [_SPEAKERS["user"], *list(names)[:MOST_NAMES]]]
