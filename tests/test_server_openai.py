"""The `openai` client against the server: what it can send is followed, accepted where it means nothing, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletionMessage, completion_create_params as chat_params
from pydantic import ValidationError

from longread.server.choices import sampling_of
from longread.server.openai.requests import ChatRequest, CompletionRequest, Message
from longread.server.openai.template import ends_of, text_of
from tests.server import post, serving

ASK: list[Any] = [{"role": "user", "content": "Who?"}]
FUNCTION: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("sessions")) as client:
        yield client


@pytest.fixture(scope="module")
def client(served: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=served)


def whole(client: openai.OpenAI, messages: list[Any]) -> ChatCompletionMessage:
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=6).choices[0].message


def streamed(client: openai.OpenAI, messages: list[Any]) -> ChatCompletionMessage:
    deltas = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, stream=True)
    ]
    content = "".join(delta.content or "" for delta in deltas)
    return ChatCompletionMessage.model_validate(deltas[0].model_dump() | {"content": content})


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        ("object", whole),
        ("dump", streamed),
        ("dump without null", whole),
        pytest.param("object", streamed, marks=pytest.mark.slow),
        pytest.param("dump", whole, marks=pytest.mark.slow),
        pytest.param("dump without null", streamed, marks=pytest.mark.slow),
    ],
)
def test_ten_turns_of_chat(client: openai.OpenAI, answer: Any, sent: str) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Be kind."}]
    for turn in range(10):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        found = answer(client, messages)
        assert found.role == "assistant"
        messages.append(found if sent == "object" else found.model_dump(exclude_none=sent != "dump"))
    assert len(messages) == 21


def test_what_the_helpers_of_the_client_made_can_be_sent_back(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=ASK, max_tokens=300, stop=["a", "e", "o"], seed=1)
    with client.chat.completions.stream(
        model="tiny", messages=ASK, max_tokens=300, stop=["a", "e", "o"], seed=1
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == parsed.choices[0].message.content
    for message in (parsed.choices[0].message, final.choices[0].message):
        assert whole(client, [*ASK, message.model_dump(), *ASK]).content is not None


def test_every_argument_of_the_client_is_known() -> None:
    """By name; what becomes of each the other tests say."""
    for typed, model in (
        (chat_params.CompletionCreateParamsStreaming, ChatRequest),
        (text_params.CompletionCreateParamsStreaming, CompletionRequest),
    ):
        assert set(typed.__annotations__) | {"stream"} <= set(model.model_fields)
    assert set(ChatCompletionMessage.model_fields) <= set(Message.model_fields)


@pytest.mark.parametrize(
    "arguments",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"service_tier": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
        {"tools": [], "tool_choice": "none", "reasoning_effort": "none", "logit_bias": {}},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "n": 1, "seed": 2**62, "stop": [], "temperature": 0},
        {"logprobs": True, "top_logprobs": 0},
        {"max_tokens": None, "max_completion_tokens": 3, "top_logprobs": None, "stream_options": None, "seed": None},
    ],
)
def test_what_asks_for_what_is_done_is_accepted(client: openai.OpenAI, arguments: dict[str, Any]) -> None:
    found = client.chat.completions.create(model="tiny", messages=ASK, **{"max_tokens": 3, **arguments})
    assert found.usage is not None
    assert found.usage.completion_tokens <= 3
    assert found.service_tier == ("default" if "service_tier" in arguments else None)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"tools": [FUNCTION]}, "unsupported_parameter"),
        ({"tools": [FUNCTION], "tool_choice": "required"}, "unsupported_parameter"),
        ({"tool_choice": "auto"}, "unsupported_value"),
        ({"parallel_tool_calls": False}, "unsupported_parameter"),
        ({"functions": [{"name": "look"}]}, "unsupported_parameter"),
        ({"function_call": "auto"}, "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "unsupported_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "unsupported_value"),
        ({"modalities": ["text", "audio"]}, "unsupported_value"),
        ({"audio": {"voice": "ash", "format": "wav"}}, "unsupported_parameter"),
        ({"service_tier": "flex"}, "unsupported_value"),
        ({"verbosity": "low"}, "unsupported_value"),
        ({"reasoning_effort": "high"}, "unsupported_value"),
        ({"prediction": {"type": "content", "content": "x"}}, "unsupported_parameter"),
        ({"web_search_options": {}}, "unsupported_parameter"),
        ({"moderation": {"model": "m"}}, "unsupported_parameter"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "unsupported_parameter"),
        ({"prompt_cache_retention": "24h"}, "unsupported_parameter"),
        ({"logit_bias": {"7": 1}}, "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "unsupported_parameter"),
        ({"presence_penalty": False}, "unsupported_parameter"),
        ({"top_logprobs": 0}, "invalid_value"),
        ({"top_logprobs": 2, "logprobs": False}, "invalid_value"),
        ({"stream_options": {}}, "invalid_value"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "invalid_value"),
        ({"max_completion_tokens": 3}, "invalid_value"),
        ({"metadata": {"a": "b" * 513}}, "invalid_value"),
        ({"user": 7}, "invalid_value"),
        ({"extra_body": {"colour": 1}}, "unknown_parameter"),
    ],
)
def test_what_cannot_be_followed_is_refused(client: openai.OpenAI, arguments: dict[str, Any], code: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=ASK, **{"max_tokens": 3, **arguments})
    name = next(iter(arguments.get("extra_body", arguments)))
    assert (refused.value.type, refused.value.code) == ("invalid_request_error", code)
    assert str(refused.value.param).startswith(name)
    assert name in refused.value.message


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "4", "tool_call_id": "a"}, ".role"),
        ({"role": "function", "content": "4", "name": "look"}, ".role"),
        ({"role": "assistant", "tool_calls": [{"id": "a", **FUNCTION}]}, ".tool_calls"),
        ({"role": "assistant", "function_call": {"name": "look", "arguments": ""}}, ".function_call"),
        ({"role": "assistant", "audio": {"id": "a"}}, ".audio"),
        ({"role": "user", "content": None}, ".content"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": "x", "refusal": "no"}, ".refusal"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, ".content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ".content[0].type"),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}, ".content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0]"),
        ({"role": "user", "content": "x", "name": "two words"}, ".name"),
        ({"role": "user", "content": "x", "tool_call_id": "a"}, ""),
    ],
)
def test_a_message_that_means_nothing_here_is_refused(client: openai.OpenAI, message: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=[message], max_tokens=1)
    if param:
        assert refused.value.param == f"messages[0]{param}"


def test_a_message_is_what_was_said() -> None:
    parts, refused = [{"type": "text", "text": text} for text in ("Who", "?")], [{"type": "refusal", "refusal": "No."}]
    said: list[tuple[dict[str, Any], str]] = [
        ({"role": "system", "content": "Be kind."}, "Be kind."),
        ({"role": "user", "name": "Ann", "content": parts}, "Ann: Who?"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "Assistant: No."),
        ({"role": "assistant", "content": refused, "annotations": []}, "Assistant: No."),
        ({"role": "user", "name": "Bob", "content": "Why?"}, "Bob: Why?"),
        ({"role": "assistant"}, "Assistant:"),
        ({"role": "assistant", "content": " As it was written."}, "Assistant: As it was written."),
    ]
    messages = [Message(**message) for message, _ in said]
    assert text_of(messages) == "\n\n".join(text for _, text in said)
    assert text_of(messages[:2]).endswith("\n\nAssistant:")
    assert ends_of(messages) == ["\n\nUser:", "\n\nBob:", "\n\nAnn:"]


def test_an_answer_ends_where_a_user_with_a_name_would_speak(served: TestClient) -> None:
    messages = [{"role": "user", "name": "Ann", "content": "Who?"}]
    body = {"seed": 2, "max_tokens": 12}
    chat = post(served, "/v1/chat/completions", model="tiny", messages=messages, **body)["choices"][0]
    text = post(served, "/v1/completions", model="tiny", prompt="Ann: Who?\n\nAssistant:", **body)["choices"][0]
    assert chat["message"]["content"] == text["text"]


@pytest.mark.parametrize(
    "body",
    [
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        {"best_of": 3},
        {"best_of": 1, "n": 2},
        {"suffix": "x"},
        {"frequency_penalty": 1},
        {"logit_bias": {"1": 5}},
    ],
)
def test_nothing_is_accepted_and_ignored_by_completions(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest(model="m", prompt="x", **body)


def test_no_prompt_is_the_beginning_of_a_text(client: openai.OpenAI) -> None:
    found, empty = (
        client.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2, best_of=2, seed=3)
        for prompt in (None, "")
    )
    assert [choice.text for choice in found.choices] == [choice.text for choice in empty.choices]


def test_no_two_choices_of_any_seeds_draw_alike() -> None:
    service: Any = SimpleNamespace(stop_ids=frozenset())
    seeds = [-(2**63), -1, *range(60), 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 2]
    found = [
        sampling_of(service, CompletionRequest(model="m", prompt="p", seed=seed, n=40), 4, 0, choice).seed
        for seed in seeds
        for choice in range(40)
    ]
    assert len(set(found)) == len(found)
    assert found[::40] == seeds


def test_a_model_that_is_not_here_tokenizes_nothing(served: TestClient) -> None:
    assert post(served, "/tokenize", text="a", model="tiny")["count"] == 1
    assert post(served, "/tokenize", 404, text="a", model="other")["error"]["code"] == "model_not_found"
    assert post(served, "/detokenize", 404, tokens=[97], model="other")["error"]["param"] == "model"
