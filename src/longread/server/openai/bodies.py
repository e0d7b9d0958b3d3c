"""What /v1/responses and /v1/conversations take, as `requests` says it of completions and chats."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from longread.server.schemas import (
    NO_CACHE,
    NO_OBFUSCATION,
    NO_TOOLS,
    NOTHING,
    TEXT_ONLY,
    Hint,
    Metadata,
    Only,
    RequestBody,
    WritingOptions,
)

LOGPROBS = "message.output_text.logprobs"
"""What can be included in a response."""
Name = Annotated[str, Field(max_length=100)]
_KINDS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


class ItemPart(RequestBody):
    """A part of what an item says."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[dict[str, Any]] | None = None
    logprobs: list[dict[str, Any]] | None = None
    prompt_cache_breakpoint: Annotated[Any, Only((), NO_CACHE)] = None

    @model_validator(mode="after")
    def _of_its_type(self) -> Self:
        wanted = _KINDS[self.type]
        if getattr(self, wanted) is None or (self.text is not None and self.refusal is not None):
            raise ValueError(f"a part of type {self.type} has {wanted}, and nothing else")
        return self


class InputItem(RequestBody):
    """One message. What this server sends can be sent back as it is."""

    type: Annotated[Any, Only(("message",), "only messages are read here: the model calls no tools")] = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ItemPart]
    id: Name | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    """What kind of an answer it was; nothing that a model reads."""

    @property
    def name(self) -> None:
        """Items do not say who speaks but by their role."""

    @property
    def text(self) -> str:
        """What was said, in one piece."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or part.refusal or "" for part in self.content)


Items = Annotated[list[InputItem], Field(max_length=10_000)]


class ConversationName(RequestBody):
    """Which conversation."""

    id: Name


class ReasoningOptions(RequestBody):
    """How to think; there is one way."""

    effort: Annotated[Any, Only(("none",), NOTHING)] = None
    summary: Annotated[Any, Only((), NOTHING)] = None
    generate_summary: Annotated[Any, Only((), NOTHING)] = None
    context: Annotated[Any, Only(("auto",), NOTHING)] = None
    mode: Annotated[Any, Only(("standard",), NOTHING)] = None


class TextOptions(RequestBody):
    """Which form the answer has."""

    format: Annotated[
        Any, Only(({"type": "text"},), "no format but text is promised, so check what is written yourself")
    ] = None
    verbosity: Annotated[Any, Only(("medium",), "use max_output_tokens instead")] = None


class ResponseStreamOptions(RequestBody):
    """What a stream has besides its events."""

    include_obfuscation: Annotated[Any, Only((False,), NO_OBFUSCATION)] = None


class ResponseContext(RequestBody):
    """What a response goes on from."""

    model: Annotated[str, Field(max_length=1000)] | None = None
    input: str | Items | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    conversation: Name | ConversationName | None = None
    parallel_tool_calls: bool | None = None
    """Without effect: no tools are called."""
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tool_choice: Annotated[Any, Only(("none", "auto"), NO_TOOLS)] = None
    tools: Annotated[Any, Only(([],), NO_TOOLS)] = None
    truncation: Literal["auto", "disabled"] | None = None
    """Without effect: nothing is ever too long to be gone on with."""

    @field_validator("conversation")
    @classmethod
    def _one_past(cls, value: str | ConversationName | None, info: ValidationInfo) -> str | ConversationName | None:
        if value is not None and info.data.get("previous_response_id") is not None:
            raise ValueError("previous_response_id is given too, so leave one of the two out")
        return value

    @property
    def messages(self) -> list[InputItem]:
        """The input as messages."""
        if self.input is None:
            return []
        return [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def conversation_id(self) -> str | None:
        """Of the conversation, however it is named."""
        return self.conversation.id if isinstance(self.conversation, ConversationName) else self.conversation


class CountRequest(ResponseContext):
    """Body of /v1/responses/input_tokens."""

    personality: Annotated[Any, Only((), NOTHING)] = None


class ResponseRequest(ResponseContext, WritingOptions):
    """Body of /v1/responses."""

    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = True
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Metadata | None = None
    include: list[Annotated[Any, Only((LOGPROBS,), "there is nothing else to include")]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    learn: bool | None = None
    """Whether the model learns while it reads and writes, from here on; null: as before, or as it was trained to."""
    reuse: bool | None = None
    """Whether an input that begins with what a session has read goes on from it; null: as the server was started."""
    user: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None
    service_tier: Annotated[Any, Only(("auto", "default"), "there is one tier, default")] = None
    background: Annotated[Any, Only((False,), "every answer is waited for, so leave it out")] = None
    background_options: Annotated[Any, Only((), "every answer is waited for, so leave it out")] = None
    context_management: Annotated[Any, Only(([],), "a session takes the same room at every length")] = None
    max_tool_calls: Annotated[Any, Only((), NO_TOOLS)] = None
    prompt: Annotated[Any, Only((), "no prompts are kept here, so send it as input")] = None
    prompt_cache_options: Annotated[Any, Only((), NO_CACHE)] = None
    prompt_cache_retention: Annotated[Any, Only((), NO_CACHE)] = None
    moderation: Annotated[Any, Only((), NOTHING)] = None
    access_programs: Annotated[Any, Only((), NOTHING)] = None
    image: Annotated[Any, Only((), TEXT_ONLY)] = None

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not info.data.get("stream"):
            raise ValueError("it is only allowed with stream: true")
        return value

    @field_validator("store")
    @classmethod
    def _in_a_conversation(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value is False and info.data.get("conversation") is not None:
            raise ValueError("a conversation keeps its items, so leave one of the two out")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("include"):
            raise ValueError(f"it is only allowed with include: [{LOGPROBS}]")
        return value


class ConversationRequest(RequestBody):
    """Body of /v1/conversations."""

    items: Annotated[list[InputItem], Field(max_length=20)] | None = None
    metadata: Metadata | None = None


class ConversationUpdate(RequestBody):
    """What is to be noted of a conversation instead."""

    metadata: Metadata | None


class ItemsRequest(RequestBody):
    """More items of a conversation."""

    items: Annotated[list[InputItem], Field(max_length=20)]
