"""What the server is and how it is: health, version, numbers, models, and its tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import AliasChoices, BaseModel, Field

from longread import __version__
from longread.server.choices import token_text
from longread.server.metrics import CONTENT_TYPE
from longread.server.schemas import REPLIES, RequestBody, TokenId
from longread.server.service import Service, TheService

router = APIRouter(tags=["about"], responses=REPLIES)


class Status(BaseModel):
    """How the server is."""

    status: str


class TokenizeRequest(RequestBody):
    """A text; `prompt` and `add_special_tokens` are what some clients call the arguments."""

    text: Annotated[str, Field(validation_alias=AliasChoices("text", "prompt"))]
    bos: Annotated[bool, Field(validation_alias=AliasChoices("bos", "add_special_tokens"))] = False
    model: str | None = None


class Tokens(BaseModel):
    """Token ids, and the UTF-8 bytes that each covers."""

    tokens: list[int]
    bytes: list[int]
    count: int


class DetokenizeRequest(RequestBody):
    """Token ids."""

    tokens: list[TokenId]
    model: str | None = None


class DetokenizedText(BaseModel):
    """A text, under both names."""

    text: str
    prompt: str


@router.get("/health", response_model=Status)
async def health() -> dict[str, str]:
    """Answers as long as the process does."""
    return {"status": "ok"}


@router.get("/ready", response_model=Status)
async def ready(service: TheService) -> dict[str, str]:
    """Whether requests are taken; while the server stops the answer is 503."""
    return {"status": "stopping" if service.stopping else "ready"}


@router.get("/version")
async def version(service: TheService) -> dict[str, Any]:
    """What runs here."""
    return {
        "longread": __version__,
        "torch": torch.__version__,
        "model": service.name,
        "fingerprint": service.fingerprint,
        "device": service.device,
    }


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: TheService) -> Response:
    """Counters and gauges, as Prometheus reads them."""
    return Response(await service.run(service.meters.text), media_type=CONTENT_TYPE)


@router.get("/v1/models")
async def models(service: TheService) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(service)]}


@router.get("/v1/models/{model:path}")
async def model(model: str, service: TheService) -> dict[str, Any]:
    """The model, if this is its name."""
    service.check_model(model)
    return _model(service)


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, service: TheService) -> dict[str, Any]:
    """A text as token ids."""
    _check_model(service, body)
    ids, lengths = await service.run(service.encode, body.text, bos=body.bos)
    return {"tokens": ids, "bytes": lengths, "count": len(ids)}


@router.post("/detokenize", response_model=DetokenizedText)
async def detokenize(body: DetokenizeRequest, service: TheService) -> dict[str, str]:
    """Token ids as a text."""
    _check_model(service, body)
    text = await service.run(service.tokenizer.decode, body.tokens)
    return {"text": text, "prompt": text}


@router.get("/tokenizer_info")
async def tokenizer_info(service: TheService) -> dict[str, Any]:
    """The special tokens; some clients tokenize here instead of loading the tokenizer."""
    bos = service.tokenizer.bos_id
    name = None if bos is None else token_text(service.tokenizer, bos)
    return {"bos_token": None, "eos_token": None, "bos_id": bos, "bos_name": name, "chat_template": None}


def _check_model(service: Service, body: TokenizeRequest | DetokenizeRequest) -> None:
    if body.model is not None:
        service.check_model(body.model)


def _model(service: Service) -> dict[str, Any]:
    config, limits = service.config, service.limits
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "longread",
        "vocab_size": config.vocab_size,
        "window_size": config.window_size,
        "mini_batch_size": config.mini_batch_size,
        "parameters": config.num_parameters,
        "fast_weights": config.num_fast_weights,
        "bos_id": service.tokenizer.bos_id,
        "limits": {"body_bytes": limits.body_bytes, "tokens": limits.tokens, "choices": limits.choices},
    }
