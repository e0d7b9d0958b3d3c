"""Completions and chats that go on from what a session has read: one that is named, or one that is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings, strategies as st

from longread.server import ServerLimits
from longread.server.openai.prefix import BLOCK, TokenPrefix, chain_of
from longread.session import Session
from tests.server import ALICE, BOB, BOS, INNER, TEXT, bearer, make_model, post, serving, session


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("sessions")) as client:
        yield client


def connected(served: TestClient, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url="http://localhost/v1", api_key=key, max_retries=0, http_client=served)


def read_of(served: TestClient) -> int:
    """Tokens that the engine's sessions have read."""
    return int(served.app.state.service.engine.stats()["tokens_read"])  # type: ignore[attr-defined]


def cached(found: Any) -> int:
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    return int(found.usage.prompt_tokens_details.cached_tokens)


def written(ids: list[int], more: list[int]) -> str:
    """What the library writes after reading both."""
    plain = Session(make_model(), INNER)
    plain.read(ids)
    plain.read(more)
    return bytes(plain.generate(9, temperature=0)).decode(errors="replace")


def test_a_completion_goes_on_from_a_session(served: TestClient) -> None:
    client, one = connected(served), session(served, TEXT)
    before, there = read_of(served), served.get(f"/v1/sessions/{one}").json()["position"]
    found = client.completions.create(
        model="tiny", prompt="More.", max_tokens=9, temperature=0, n=2, extra_body={"session": one}
    )
    assert [choice.text for choice in found.choices] == [written([BOS, *TEXT.encode()], list(b"More."))] * 2
    assert found.usage is not None
    assert (cached(found), found.usage.prompt_tokens) == (there, there + 5)
    assert read_of(served) - before == 2 * 5
    assert served.get(f"/v1/sessions/{one}").json()["position"] == there, "it stays as it is"
    nothing = client.completions.create(
        model="tiny", prompt="", max_tokens=9, temperature=0, extra_body={"session": one}
    )
    assert nothing.choices[0].text == written([BOS, *TEXT.encode()], [])
    echo = post(served, "/v1/completions", model="tiny", prompt="More.", max_tokens=0, echo=True, session=one)
    assert echo["choices"][0]["text"] == "More."
    fresh = session(served)
    first = post(served, "/v1/completions", model="tiny", prompt="Once", max_tokens=9, temperature=0, session=fresh)
    assert first["choices"][0]["text"] == written([BOS, *b"Once"], [])


def test_a_chat_goes_on_from_a_session_or_a_response(served: TestClient) -> None:
    client, one = connected(served), session(served, TEXT)
    turn = "\n\nUser: Who?\n\nAssistant:"
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "Who?"}]}
    found = client.chat.completions.create(**asked, max_tokens=9, extra_body={"session": one})
    assert found.choices[0].message.content == written([BOS, *TEXT.encode()], list(turn.encode()))
    root = client.responses.create(model="tiny", input="Hello.", max_output_tokens=3)
    more = client.chat.completions.create(**asked, max_tokens=9, extra_body={"session": root.id})
    again = client.responses.create(
        model="tiny", input="Who?", max_output_tokens=9, temperature=0, previous_response_id=root.id
    )
    assert more.choices[0].message.content == again.output_text
    assert root.usage is not None
    assert cached(more) == root.usage.total_tokens
    for unknown in ("0" * 32, "resp_" + "0" * 32):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**asked, extra_body={"session": unknown})


def test_a_conversation_that_is_sent_again_is_not_read_again(tmp_path: Path) -> None:
    """What a client does that knows nothing of sessions; its answers are empty, so that they are surely UTF-8."""
    with serving(tmp_path) as served:
        served.app.state.service.reuse = True  # type: ignore[attr-defined]
        client, messages, before = connected(served), list[Any](), 0
        for turn in range(5):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            read = read_of(served)
            found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=0, store=True)
            assert found.usage is not None
            assert cached(found) == before
            assert read_of(served) - read == found.usage.prompt_tokens - before
            before = found.usage.prompt_tokens
            messages.append(found.choices[0].message)
        messages.append({"role": "user", "content": "And?"})
        options: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 9, "temperature": 0}
        reused = client.chat.completions.create(**options)
        fresh = client.chat.completions.create(**options, extra_body={"reuse": False})
        assert (cached(reused), cached(fresh)) == (before, 0)
        assert reused.choices == fresh.choices
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert cached(chunks[-1]) == before


def test_a_first_turn_goes_on_from_what_was_read(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        client = connected(served)
        prompt = "Be kind.\n\nUser: Who?\n\nAssistant:"
        options: dict[str, Any] = {"model": "tiny", "store": True, "extra_body": {"reuse": True}}
        stored = post(served, "/v1/completions", model="tiny", prompt=prompt, max_tokens=0, store=True, reuse=True)
        asked = {"input": "Who?", "instructions": "Be kind.", "max_output_tokens": 5, "temperature": 0}
        found = client.responses.create(**asked, **options)  # type: ignore[arg-type]
        fresh = client.responses.create(**asked, model="tiny")  # type: ignore[arg-type]
        assert found.usage is not None
        assert found.usage.input_tokens_details.cached_tokens == stored["usage"]["prompt_tokens"] == len(prompt) + 1
        assert found.output_text == fresh.output_text
        assert fresh.usage is not None
        assert fresh.usage.input_tokens_details.cached_tokens == 0
        more = client.responses.create(input="And?", max_output_tokens=1, previous_response_id=found.id)
        assert more.usage is not None
        assert more.usage.input_tokens_details.cached_tokens == found.usage.total_tokens


def test_only_what_was_read_is_reused(tmp_path: Path) -> None:
    with serving(tmp_path, keys=True, limits=ServerLimits(responses=5)) as served:

        def completed(prompt: list[int], key: str = ALICE, **options: Any) -> int:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "reuse": True, **options}
            found = served.post("/v1/completions", json=body, headers=bearer(key)).json()
            assert found["usage"]["prompt_tokens"] == len(prompt)
            return int(found["usage"]["prompt_tokens_details"]["cached_tokens"])

        draw = Random(7)
        ids = [BOS, *(draw.randrange(256) for _ in range(3 * BLOCK))]
        assert completed(ids, store=True, max_tokens=0) == 0
        assert completed(ids, echo=True, logprobs=1, max_tokens=0) == 0, "every token is wanted"
        assert completed([*ids, 1, 2, 3]) == len(ids)
        assert completed(ids) == len(ids)
        assert completed([*ids, 1, 2, 3], BOB) == 0
        assert completed([*ids, 1, 2, 3], learn=False) == 0
        assert completed([*ids, 1, 2, 3], reuse=False) == 0
        assert completed(ids[:-1]) == 0
        for i in (0, BLOCK - 1, BLOCK, len(ids) - 1):
            assert completed([*ids[:i], (ids[i] + 1) % 256, *ids[i + 1 :], 1]) == 0
        assert completed([*ids, 1, 2], store=True, max_tokens=0) == len(ids)
        assert completed([*ids, 1, 2, 3]) == len(ids) + 2, "the longest"
        listed = served.get("/v1/sessions", headers=bearer(ALICE)).json()["data"]
        assert listed == []
        kept = served.app.state.service.history.ids()  # type: ignore[attr-defined]
        assert len(kept) == 2
        for one in kept:
            assert served.get(f"/v1/responses/{one}", headers=bearer(ALICE)).status_code == 404, "it is no response"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 3 * BLOCK), max_size=5), st.integers(0, 2**20))
def test_a_prefix_is_the_same_however_it_was_read(lengths: list[int], seed: int) -> None:
    draw, prefix, read = Random(seed), TokenPrefix(learn=True), list[int]()
    for length in [*lengths, 1]:
        more = [draw.randrange(2**16) for _ in range(length)]
        prefix, read = prefix.extended(more), [*read, *more]
    assert prefix == TokenPrefix(learn=True).extended(read)
    for more in ([], [1], [1] * BLOCK):
        assert prefix.begins([*read, *more], chain_of([*read, *more]))
    assert not prefix.begins(read[:-1], chain_of(read[:-1]))
    read[draw.randrange(len(read))] += 1
    assert not prefix.begins([*read, 1], chain_of([*read, 1]))
