"""What tests of responses share: asking by the openai client, and counting what was read for it."""

from __future__ import annotations

from typing import Any

import openai
from fastapi.testclient import TestClient
from openai.types.responses import Response

from longread.session import Session
from tests.server import make_model

TOKENS = 3
"""Of an answer, where nothing else is asked for."""


def connected(served: TestClient, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url="http://localhost/v1", api_key=key, max_retries=0, http_client=served)


def ask(client: openai.OpenAI, said: Any, **options: Any) -> Response:
    found: Response = client.responses.create(model="tiny", input=said, **{"max_output_tokens": TOKENS, **options})
    return found


def read_of(served: TestClient) -> int:
    """Tokens that the engine's sessions have read."""
    count = served.app.state.service.engine.stats()["tokens_read"]  # type: ignore[attr-defined]
    return int(count)


def usage(response: Response) -> tuple[int, int, int]:
    """Tokens before the answer, those of them that were not read again, tokens of the answer."""
    assert response.usage is not None
    found = response.usage
    assert found.total_tokens == found.input_tokens + found.output_tokens
    return found.input_tokens, found.input_tokens_details.cached_tokens, found.output_tokens


def written(response: Response, served: TestClient) -> list[int]:
    """The tokens of an answer, as the session has them in its window."""
    engine = served.app.state.service.engine  # type: ignore[attr-defined]
    session = Session.restore(engine.save(response.id.removeprefix("resp_")), make_model())
    return session.recent[-usage(response)[2] :]
