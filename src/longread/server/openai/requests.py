"""What /v1/completions and /v1/chat/completions take: OpenAI's requests, as far as they make sense here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

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
    TokenId,
    WritingOptions,
)


class StreamOptions(RequestBody):
    """How a stream ends."""

    include_usage: bool | None = False
    include_obfuscation: Annotated[Any, Only((False,), NO_OBFUSCATION)] = None


class OpenAIRequest(WritingOptions):
    """What completions and chats share."""

    model: Annotated[str, Field(max_length=1000)]
    n: Annotated[int, Field(ge=1)] | None = 1
    """At most the server's limit `choices`, divided by the number of prompts."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    learn: bool | None = None
    """Whether the model learns while it reads the prompt, and what it writes; null: as it was trained to."""
    session: Annotated[str, Field(max_length=100)] | None = None
    """Goes on from what this session, or that of this response, has read, and leaves it as it is."""
    reuse: bool | None = None
    """Whether a prompt that begins with what a session has read goes on from it; null: as the server was started."""
    presence_penalty: Annotated[Any, Only((0,), "it must be 0, and repetition_penalty can be used instead")] = None
    frequency_penalty: Annotated[Any, Only((0,), "it must be 0, and repetition_penalty can be used instead")] = None
    logit_bias: Annotated[Any, Only(({},), "it must be empty or left out, as there are no biases here")] = None
    user: Hint = None
    metadata: Metadata | None = None
    store: bool | None = None
    """With `reuse`, keeps what one choice has read for prompts that begin with it; otherwise without effect."""

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("it is only allowed with stream: true")
        return value


class CompletionRequest(OpenAIRequest):
    """Body of /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] | None = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    best_of: int | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[Any, Only(("",), "it must be left out, as the model writes from left to right only")] = None

    @field_validator("best_of")
    @classmethod
    def _all_of_them(cls, value: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n") or 1
        if value not in (None, n):
            raise ValueError(f"it must be n, {n}, so ask for n and choose")
        return value


class ContentPart(RequestBody):
    """A part of a message's content."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: Annotated[Any, Only((), NO_CACHE)] = None

    @model_validator(mode="after")
    def _of_its_type(self) -> Self:
        other = "refusal" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type} has {self.type}, and no {other}")
        return self


class Message(RequestBody):
    """One message of a chat. What this server sends can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[ContentPart] | None, Field(validate_default=True)] = None
    name: Annotated[str, Field(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = None
    """Who speaks; without it the role says so."""
    refusal: str | None = None
    annotations: list[dict[str, Any]] | None = None
    """Where words of the assistant come from; nothing that a model reads."""
    audio: Annotated[Any, Only((), TEXT_ONLY)] = None
    function_call: Annotated[Any, Only((), NO_TOOLS)] = None
    tool_calls: Annotated[Any, Only(([],), NO_TOOLS)] = None
    parsed: Annotated[Any, Only((), TEXT_ONLY)] = None

    @field_validator("content", "refusal", "annotations")
    @classmethod
    def _of_its_speaker(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("role", "assistant") == "assistant":
            return value
        if info.field_name != "content":
            if value is not None:
                raise ValueError("only messages of the assistant have it")
        elif value is None:
            raise PydanticKnownError("missing")
        elif isinstance(value, list) and any(part.type == "refusal" for part in value):
            raise ValueError("only the assistant refuses, so its parts must be texts")
        return value

    @property
    def text(self) -> str:
        """What was said, in one piece."""
        if isinstance(self.content, list):
            return "".join(part.text or part.refusal or "" for part in self.content)
        return self.content or self.refusal or ""


class ChatRequest(OpenAIRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    service_tier: Annotated[Any, Only(("auto", "default"), "there is one tier, default")] = None
    prompt_cache_key: Hint = None
    safety_identifier: Hint = None
    response_format: Annotated[
        Any, Only(({"type": "text"},), "no format but text is promised, so check what is written yourself")
    ] = None
    modalities: Annotated[Any, Only((["text"],), TEXT_ONLY)] = None
    verbosity: Annotated[Any, Only(("medium",), "use max_tokens instead")] = None
    reasoning_effort: Annotated[Any, Only(("none",), NOTHING)] = None
    tools: Annotated[Any, Only(([],), NO_TOOLS)] = None
    tool_choice: Annotated[Any, Only(("none",), NO_TOOLS)] = None
    parallel_tool_calls: Annotated[Any, Only((), NO_TOOLS)] = None
    functions: Annotated[Any, Only(([],), NO_TOOLS)] = None
    function_call: Annotated[Any, Only(("none",), NO_TOOLS)] = None
    audio: Annotated[Any, Only((), TEXT_ONLY)] = None
    prediction: Annotated[Any, Only((), NOTHING)] = None
    moderation: Annotated[Any, Only((), NOTHING)] = None
    web_search_options: Annotated[Any, Only((), NOTHING)] = None
    prompt_cache_options: Annotated[Any, Only((), NO_CACHE)] = None
    prompt_cache_retention: Annotated[Any, Only((), NO_CACHE)] = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") is not None:
            raise ValueError("max_tokens is given too, so leave one of the two out")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("it is only allowed with logprobs: true")
        return value
