"""The `openai` client over /v1/responses: every id is a session that is gone on from, and nothing is read twice."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai.types import shared_params
from openai.types.conversations import conversation_create_params, conversation_update_params, item_create_params
from openai.types.responses import (
    ResponseOutputMessage,
    ResponseOutputText,
    input_token_count_params,
    response_create_params as params,
)

from longread.server.choices import Writer
from longread.server.openai.bodies import (
    ConversationRequest,
    ConversationUpdate,
    CountRequest,
    InputItem,
    ItemPart,
    ItemsRequest,
    ReasoningOptions,
    ResponseRequest,
    ResponseStreamOptions,
    TextOptions,
)
from longread.server.openai.template import text_of
from longread.session import Session
from tests.responding import TOKENS, ask, connected, read_of, usage, written
from tests.server import BOS, INNER, make_model, serving
from tests.tokenizer_kinds import KINDS, tokenizer_of

ENDING: dict[str, Any] = {"stop": ["a", "b", "c", "d"], "seed": 1}
"""Which the answers of these tests meet before long."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("sessions")) as client:
        yield client


@pytest.fixture(scope="module")
def client(served: TestClient) -> openai.OpenAI:
    return connected(served)


def test_fifty_turns_cost_what_two_do(served: TestClient, client: openai.OpenAI) -> None:
    previous, costs = None, []
    for turn in range(50):
        before = read_of(served)
        options = {} if previous is None else {"previous_response_id": previous.id}
        found = ask(client, f"Question {turn:02}?", instructions="Be kind.", **options)
        read, cached, wrote = usage(found)
        assert cached == (0 if previous is None else sum(usage(previous)[::2])), "all that the session before has read"
        assert read_of(served) - before == read - cached + wrote, "what is not cached is what the engine has read"
        assert found.previous_response_id == options.get("previous_response_id")
        previous = found
        costs.append(read - cached)
    assert len(set(costs[1:])) == 1


def test_a_turn_adds_the_tokens_that_the_whole_conversation_has(served: TestClient, client: openai.OpenAI) -> None:
    """The tokenizer is one of bytes: where a text is cut makes no difference."""
    said = [("system", "Be kind."), ("user", "Who?")]
    found = ask(client, "Who?", instructions="Be kind.", temperature=0)
    ids = [BOS, *text_of(items(said)).encode(), *written(found, served)]
    for turn in range(3):
        found = ask(client, [{"role": "user", "content": f"And {turn}?"}], previous_response_id=found.id, temperature=0)
        ids += [*text_of(items([("user", f"And {turn}?")]), goes_on=True).encode(), *written(found, served)]
    assert usage(found)[0] + usage(found)[2] == len(ids)
    plain = Session(make_model(), INNER)
    plain.read(ids)
    info = served.app.state.service.engine.info(found.id.removeprefix("resp_"))  # type: ignore[attr-defined]
    assert (info.position, info.steps) == (plain.position, plain.steps)
    assert info.drift == pytest.approx(plain.drift(), rel=1e-4)


def items(said: list[tuple[str, str]]) -> list[InputItem]:
    return [InputItem.model_validate({"role": role, "content": content}) for role, content in said]


@pytest.mark.parametrize("answer", ["", " Yes.", "\nYes", "Yes, it is. ", " caf\u00e9"])
def test_a_chat_in_turns_is_the_chat_as_a_whole(answer: str) -> None:
    said = [("system", "Be kind."), ("user", "Who?")]
    more = [("system", "Be brief."), ("user", "And?")]
    whole = text_of(items([*said, ("assistant", answer), *more]))
    turns = text_of(items(said)) + answer + text_of(items(more), goes_on=True)
    assert whole == (turns if answer[:1] in ("", " ", "\n") else turns.replace("Assistant:Yes", "Assistant: Yes"))


@pytest.mark.parametrize("written", [" Yes.\n\nUser: more", " Yes", " a\n\nUser:", "\n\nUser: x", " \u2026\n\nUser:"])
def test_a_session_ends_where_its_answer_does(written: str) -> None:
    """No part of a stop text has been read, whichever tokens it came in."""
    across = 0
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        before, tokens = tokenizer.encode("Assistant:"), tokenizer.encode_inside(written)[0]
        writer = Writer(tokenizer, ["\n\nUser:"], before)
        for token in tokens:
            writer.push(SimpleNamespace(id=token))  # type: ignore[arg-type]
        writer.close()
        assert "\n\nUser" not in writer.text
        if not writer.stopped:
            assert writer.ids == tokens
            continue
        shown = tokenizer.decode([*before, *writer.ids]).removeprefix(tokenizer.decode(before))
        assert shown == writer.text, kind
        across += writer.ids != tokens[: len(writer.ids)]
    assert across or "." not in written, "some of these tokenizers join a point and the lines after it"


def test_an_earlier_response_is_branched(client: openai.OpenAI) -> None:
    root = ask(client, "Who?", temperature=0)
    first = ask(client, "And?", previous_response_id=root.id, temperature=0)
    other = ask(client, "But?", previous_response_id=root.id, temperature=0)
    again = ask(client, "And?", previous_response_id=root.id, temperature=0)
    assert usage(first) == usage(again)
    assert first.output_text == again.output_text, "the branches do not know of each other"
    assert len({root.id, first.id, other.id, again.id}) == 4
    deeper = ask(client, "Then?", previous_response_id=first.id, temperature=0)
    client.responses.delete(first.id)
    assert usage(ask(client, "So?", previous_response_id=deeper.id))[1] == sum(usage(deeper)[::2])


def test_a_stream_has_the_events_of_the_client(client: openai.OpenAI) -> None:
    root = ask(client, "Who?")
    options: dict[str, Any] = {"previous_response_id": root.id, "seed": 7}
    whole = ask(client, "And?", **{k: v for k, v in options.items() if k != "seed"}, extra_body={"seed": 7})
    stream = client.responses.create(
        model="tiny",
        input="And?",
        previous_response_id=root.id,
        max_output_tokens=TOKENS,
        stream=True,
        extra_body={"seed": 7},
    )
    found = list(stream)
    kinds = [event.type for event in found]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in found] == list(range(len(found)))
    text = "".join(event.delta for event in found if event.type == "response.output_text.delta")
    last: Any = found[-1]
    assert text == last.response.output_text == whole.output_text
    assert last.response.id == found[0].response.id  # type: ignore[union-attr]
    assert usage(last.response) == usage(whole)
    stored = client.responses.retrieve(last.response.id)
    assert stored == last.response
    with client.responses.stream(model="tiny", input="And?", max_output_tokens=2000, extra_body=ENDING) as helper:
        assert helper.get_final_response().status == "completed"


def test_an_answer_that_ends_by_itself_is_complete(client: openai.OpenAI) -> None:
    found = ask(client, "Who?", max_output_tokens=2000, temperature=2, extra_body=ENDING)
    assert (found.status, found.incomplete_details) == ("completed", None)
    assert not set(found.output_text) & set(ENDING["stop"])
    assert found.completed_at is not None
    more = ask(client, "And?", previous_response_id=found.id)
    assert usage(more)[1] == sum(usage(found)[::2])


def test_what_is_not_stored_is_gone(served: TestClient, client: openai.OpenAI) -> None:
    engine = served.app.state.service.engine  # type: ignore[attr-defined]
    root, sessions = ask(client, "Who?", temperature=0), len(engine.sessions())
    found = ask(client, "And?", previous_response_id=root.id, store=False, temperature=0)
    kept = ask(client, "And?", previous_response_id=root.id, temperature=0)
    assert (found.output_text, usage(found)) == (kept.output_text, usage(kept))
    assert found.usage is not None
    assert found.usage.input_tokens_details.cache_write_tokens == 0
    assert len(engine.sessions()) == sessions + 1
    for ask_for in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            ask_for(found.id)


def test_a_stored_response_is_found_and_deleted(client: openai.OpenAI) -> None:
    said: list[Any] = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    found = ask(client, said, metadata={"a": "b"}, user="u", prompt_cache_key="k", truncation="auto")
    assert client.responses.retrieve(found.id) == found
    assert found.metadata == {"a": "b"}
    given = client.responses.input_items.list(found.id, order="asc", limit=1)
    assert [item.content[0].text for item in given] == ["Be kind.", "Who?"]  # type: ignore[union-attr]
    assert [item.role for item in client.responses.input_items.list(found.id)] == ["user", "developer"]  # type: ignore[union-attr]
    client.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError, match="send the whole conversation") as refused:
        ask(client, "And?", previous_response_id=found.id)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


def test_what_was_sent_can_be_sent_back(client: openai.OpenAI) -> None:
    root = ask(client, "Who?", include=["message.output_text.logprobs"], top_logprobs=2)
    assert root.output[0].content[0].logprobs  # type: ignore[union-attr]
    history: list[Any] = [{"role": "user", "content": "Who?"}, *(item.model_dump() for item in root.output)]
    history += [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]}]
    assert usage(ask(client, history))[1] == 0


def test_instructions_are_read_once(client: openai.OpenAI) -> None:
    root = ask(client, "Who?", instructions="Be kind.")
    same = ask(client, "And?", instructions="Be kind.", previous_response_id=root.id)
    without = ask(client, "And?", previous_response_id=root.id)
    other = ask(client, "And?", instructions="Be brief.", previous_response_id=root.id)
    assert usage(same)[0] == usage(without)[0] == usage(other)[0] - len("\n\nBe brief.")
    after = ask(client, "Then?", instructions="Be kind.", previous_response_id=without.id)
    assert usage(after)[0] - usage(after)[1] == len("\n\nUser: Then?\n\nAssistant:")


def test_tokens_are_counted_before_they_are_read(client: openai.OpenAI) -> None:
    root = ask(client, "Who?")
    counted = client.responses.input_tokens.count(model="tiny", input="And?", previous_response_id=root.id)
    assert counted.input_tokens == usage(ask(client, "And?", previous_response_id=root.id))[0]


def test_every_argument_of_the_client_is_known() -> None:
    for typed, model in (
        (params.ResponseCreateParamsStreaming, ResponseRequest),
        (input_token_count_params.InputTokenCountParams, CountRequest),
        (conversation_create_params.ConversationCreateParams, ConversationRequest),
        (conversation_update_params.ConversationUpdateParams, ConversationUpdate),
        (item_create_params.ItemCreateParams, ItemsRequest),
        (shared_params.Reasoning, ReasoningOptions),
        (params.ResponseTextConfigParam, TextOptions),
        (params.StreamOptions, ResponseStreamOptions),
    ):
        named = set(typed.__annotations__) - ({"include"} if model is ItemsRequest else set())  # in the query
        assert named <= set(model.model_fields)
    assert set(ResponseOutputMessage.model_fields) <= set(InputItem.model_fields)
    assert set(ResponseOutputText.model_fields) <= set(ItemPart.model_fields)


@pytest.mark.parametrize(
    "arguments",
    [
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "truncation": "disabled"},
        {"service_tier": "auto", "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": []},
        {"tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "none"}, "background": False},
        {"stream_options": None, "context_management": [], "instructions": None, "previous_response_id": None},
    ],
)
def test_what_asks_for_what_is_done_is_accepted(client: openai.OpenAI, arguments: dict[str, Any]) -> None:
    assert usage(ask(client, "Who?", **arguments))[2] <= TOKENS


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter"),
        ({"tool_choice": "required"}, "unsupported_value"),
        ({"background": True}, "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "unsupported_value"),
        ({"text": {"format": {"type": "json_object"}}}, "unsupported_value"),
        ({"text": {"verbosity": "low"}}, "unsupported_value"),
        ({"prompt": {"id": "p"}}, "unsupported_parameter"),
        ({"include": ["reasoning.encrypted_content"]}, "unsupported_value"),
        ({"top_logprobs": 2}, "invalid_value"),
        ({"max_output_tokens": 0}, "invalid_value"),
        ({"max_tool_calls": 1}, "unsupported_parameter"),
        ({"service_tier": "flex"}, "unsupported_value"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "unsupported_parameter"),
        ({"prompt_cache_retention": "24h"}, "unsupported_parameter"),
        ({"context_management": [{"type": "compaction"}]}, "unsupported_parameter"),
        ({"moderation": {"model": "m"}}, "unsupported_parameter"),
        ({"image": {}}, "unsupported_parameter"),
        ({"access_programs": {}}, "unsupported_parameter"),
        ({"background_options": {}}, "unsupported_parameter"),
        ({"stream_options": {"include_obfuscation": False}}, "invalid_value"),
        ({"conversation": "conv_a", "previous_response_id": "resp_a"}, "invalid_value"),
        ({"store": False, "conversation": "conv_a"}, "invalid_value"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "unsupported_value"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]}, "invalid_value"),
        ({"input": []}, "invalid_value"),
        ({"extra_body": {"colour": 1}}, "unknown_parameter"),
    ],
)
def test_what_cannot_be_followed_is_refused(client: openai.OpenAI, arguments: dict[str, Any], code: str) -> None:
    sent = {"input": "Who?", **arguments}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, sent.pop("input"), **sent)
    name = next(iter(arguments.get("extra_body", arguments)))
    assert (refused.value.type, refused.value.code) == ("invalid_request_error", code)
    assert str(refused.value.param).startswith(name)
    assert name in refused.value.message


def test_a_conversation_keeps_its_items(served: TestClient, client: openai.OpenAI) -> None:
    talk = client.conversations.create(items=[{"role": "user", "content": "Hello."}], metadata={"a": "b"})
    first = ask(client, "Who?", conversation=talk.id, instructions="Be kind.")
    assert first.conversation is not None
    assert first.conversation.id == talk.id
    client.conversations.items.create(talk.id, items=[{"role": "user", "content": "Wait."}])
    before = read_of(served)
    second = ask(client, "And?", conversation={"id": talk.id}, instructions="Be kind.")
    read, cached, wrote = usage(second)
    assert cached == sum(usage(first)[::2])
    assert read - cached == len("\n\nUser: Wait.\n\nUser: And?\n\nAssistant:")
    assert read_of(served) - before == read - cached + wrote
    kept = list(client.conversations.items.list(talk.id, order="asc", limit=2))
    texts = [item.content[0].text for item in kept]  # type: ignore[union-attr]
    assert texts == ["Hello.", "Who?", first.output_text, "Wait.", "And?", second.output_text]
    assert client.conversations.items.retrieve(kept[3].id, conversation_id=talk.id) == kept[3]
    with pytest.raises(openai.BadRequestError, match="no item of this list"):
        list(client.conversations.items.list(talk.id, after="msg_0"))
    client.conversations.items.delete(kept[3].id, conversation_id=talk.id)
    third = ask(client, "So?", conversation=talk.id)
    again = items([("user", "And?"), ("assistant", second.output_text), ("user", "So?")])
    assert usage(third)[1] == sum(usage(first)[::2]), "what came after the item is read again, what came before is not"
    assert usage(third)[0] - usage(third)[1] == len(text_of(again, goes_on=True).encode())
    assert client.conversations.update(talk.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert client.conversations.retrieve(talk.id).metadata == {"c": "d"}
    assert client.conversations.delete(talk.id).deleted
    assert client.responses.retrieve(third.id) == third
    for lost in (client.conversations.retrieve, client.conversations.delete, client.conversations.items.list):
        with pytest.raises(openai.NotFoundError, match="no such conversation"):
            lost(talk.id)
    with pytest.raises(openai.NotFoundError, match="no such conversation"):
        ask(client, "And?", conversation=talk.id)


def test_a_conversation_is_read_again_where_its_sessions_are_gone(served: TestClient, client: openai.OpenAI) -> None:
    engine = served.app.state.service.engine  # type: ignore[attr-defined]
    talk = client.conversations.create()
    first = ask(client, "Who?", conversation=talk.id)
    second = ask(client, "And?", conversation=talk.id)
    engine.delete(second.id.removeprefix("resp_"))
    third = ask(client, "So?", conversation=talk.id)
    assert usage(third)[1] == sum(usage(first)[::2])
    client.responses.delete(first.id)
    client.responses.delete(third.id)
    assert usage(ask(client, "So?", conversation=talk.id))[1] == 0
    with pytest.raises(openai.NotFoundError) as lost:
        ask(client, "So?", previous_response_id=second.id)
    assert lost.value.code == "previous_response_not_found"
