"""What /v1/sessions takes and gives."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from longread.server.schemas import RequestBody, TokenId, WritingOptions

Label = Annotated[str, Field(max_length=200)]
Position = Annotated[int, Field(ge=0, lt=2**53)]
Bin = Annotated[int, Field(ge=1, le=2**20)]
SessionId = Annotated[str, Field(max_length=64)]


class CreateRequest(RequestBody):
    """A new session."""

    label: Label = ""
    learn: bool | None = None
    """Null: as the model was trained to."""
    compare: bool = False
    """Whether a frozen twin reads along, for the gain over it; twice the memory, and more than half as slow again."""


class UpdateRequest(RequestBody):
    """What is to change; null changes nothing."""

    label: Label | None = None
    learn: bool | None = None


class ForkRequest(RequestBody):
    """Another session that has read the same."""

    label: Label | None = None


class Passage(RequestBody):
    """A text, or token ids."""

    text: str | None = None
    tokens: list[TokenId] | None = None
    bin: Bin | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            given = "neither text nor tokens is" if self.text is None else "text and tokens are both"
            raise ValueError(f"{given} given; give one of the two")
        return self


class ScoreRequest(Passage):
    """A text to score; the session stays as it is."""

    stream: bool = False


class AppendRequest(ScoreRequest):
    """More of the text that the session reads."""

    expected_position: Position | None = None
    """Where the session stands. The same append sent twice, with this, is read once."""
    skip: Position = 0
    """Tokens at the beginning that the session has read already, of an append that ended early; needs a position."""


class CompareRequest(Passage):
    """A text that two sessions score."""

    sessions: Annotated[list[SessionId], Field(min_length=2, max_length=2)]


class GenerateRequest(WritingOptions):
    """How to go on with what the session has read."""

    max_tokens: Annotated[int, Field(ge=0)] = 200
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool = False


class SessionObject(BaseModel):
    """A session."""

    id: str
    object: Literal["session"]
    label: str
    parent: str | None
    position: int
    learn: bool
    compare: bool
    nbytes: int
    drift: float | None
    steps: int
    rolled_back: int
    tier: str
    created: float
    used: float


class LostSession(BaseModel):
    """What a crash or a damaged disk cost."""

    id: str
    position: int
    """Tokens that the session had read, as far as is known."""
    restored: int
    """Tokens of these that it still has; 0 where it is gone."""
    reason: str


class SessionList(BaseModel):
    """All sessions of a tenant, and what was lost of them before the server last started, or since."""

    object: Literal["list"] = "list"
    data: list[SessionObject]
    lost: list[LostSession]


class Deleted(BaseModel):
    """A session that is no more."""

    id: str
    object: Literal["session"] = "session"
    deleted: Literal[True] = True


class Bins(BaseModel):
    """Mean losses of bins of tokens, as parallel lists."""

    start: list[int]
    tokens: list[int]
    bytes: list[int] | None
    nll: list[float | None]
    frozen_nll: list[float | None] | None


class ReadingObject(BaseModel):
    """What came of reading a text."""

    session: str
    start: int
    position: int
    tokens: int
    nll: float | None
    frozen_nll: float | None
    gain: float | None
    bits_per_byte: float | None
    steps: int
    rolled_back: int
    cancelled: bool
    seconds: float
    tokens_per_second: float
    bins: Bins | None


class LossesObject(BaseModel):
    """What a session keeps of the losses of all that it has read, as parallel lists of bins."""

    session: str
    start: list[int]
    tokens: list[int]
    nll: list[float | None]
    frozen_nll: list[float | None] | None
    scored: list[int]
    """Tokens of a bin that `nll` is the mean of."""
    written: list[int]
    """Tokens of a bin that the session wrote itself."""


class Comparison(BaseModel):
    """One text, scored by two sessions."""

    readings: list[ReadingObject]
    difference: float | None


class Likely(BaseModel):
    """A token that was likely."""

    token: str
    id: int
    logprob: float | None


class Chosen(Likely):
    """A token that was written."""

    top: list[Likely]


class ContinuationObject(BaseModel):
    """What a session wrote."""

    session: str
    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]
    start: int
    position: int
    seconds: float
    tokens_per_second: float
    logprobs: list[Chosen] | None
