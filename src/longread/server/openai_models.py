"""OpenAI's requests, as far as they make sense here. An argument that would have to be ignored is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Probability = Annotated[float, Field(gt=0, le=1)]
Stop = str | list[str] | None


class Request(BaseModel):
    """What every request body has in common: no argument goes unseen, no number is NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Request):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Writing(Request):
    """How to continue a text, wherever it comes from."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Probability | None = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    seed: Seed | None = None
    stop: Stop = None


class OpenAIRequest(Writing):
    """What completions and chats share. `user`, `metadata` and `store` change nothing here and are accepted."""

    model: Annotated[str, Field(max_length=1000)]
    n: Annotated[int, Field(ge=1)] | None = 1
    """At most the server's limit `choices`, divided by the number of prompts."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    learn: bool = True
    """Whether the model learns while it reads the prompt, and what it writes."""
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _zero(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("it must be 0, and repetition_penalty can be used instead")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _empty(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value:
            raise ValueError("it must be empty or left out, as there are no biases here")
        return value


class CompletionRequest(OpenAIRequest):
    """Body of /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    best_of: int | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None

    @field_validator("best_of")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("it must be 1, so ask for n and choose")
        return value

    @field_validator("suffix")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("it must be left out, as the model writes from left to right only")
        return value


class TextPart(Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Request):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Request):
    """The only format that is not promised in vain."""

    type: Literal["text"] = "text"


class ChatRequest(OpenAIRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
