"""What the server is, and OpenAI's routes: what they answer is what the library finds."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from longread.cli import serve as command
from longread.engine import Limits
from longread.session import Session
from tests.server import BOS, INNER, TEXT, M, direct, events, make_model, post, serving


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("sessions")) as client:
        yield client


def complete(client: TestClient, status: int = 200, **body: Any) -> Any:
    return post(client, "/v1/completions", status, model="tiny", **body)


def test_what_it_is(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/version").json()["model"] == "tiny"
    model = client.get("/v1/models").json()["data"][0]
    assert (model["id"], model["mini_batch_size"], model["bos_id"]) == ("tiny", M, BOS)
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/other").status_code == 404


def test_no_route_waits_for_a_thread_before_it_begins(client: TestClient) -> None:
    """FastAPI calls what is not asynchronous in a thread of its own, each dependency in another."""
    routes = [route for route in client.app.routes if isinstance(route, APIRoute)]  # type: ignore[attr-defined]
    assert len(routes) > 30
    for route in routes:
        calls = [route.endpoint, *(dependency.call for dependency in route.dependant.dependencies)]
        assert all(map(inspect.iscoroutinefunction, calls)), route.path
        assert not any(dependency.dependencies for dependency in route.dependant.dependencies), route.path


def test_the_options_of_the_command_are_the_limits_of_the_engine() -> None:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    model = ["--model", "toy"]
    assert command._engine_limits(parser.parse_args(model)).batch_invariant is None
    given = command._engine_limits(parser.parse_args([*model, "--batch-invariant", "--max-batch", "3", "--disk", "2"]))
    assert given == Limits(batch_invariant=True, max_batch=3, max_waiting=256, disk_bytes=2**31)


def test_metrics_count(client: TestClient) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    read = 'longread_tokens_total{work="read"}'
    before = value(read)
    complete(client, prompt=TEXT, max_tokens=3)
    assert value(read) == before + 1 + len(TEXT)
    assert value('longread_requests_total{method="POST",route="/v1/completions",status="200"}') >= 1
    assert value("longread_request_seconds_count") > 0
    text = client.get("/metrics").text
    for name in ("tokens_read", "tokens_written", "steps", "rolled_back"):
        assert f"# TYPE longread_engine_{name}_total counter" in text
    assert "# HELP longread_engine_sessions Sessions, frozen twins included." in text
    assert "# TYPE longread_engine_tasks gauge" in text
    assert "_created" not in text


def test_every_number_of_the_engine_is_explained(client: TestClient) -> None:
    lines = client.get("/metrics").text.splitlines()
    helped = {line.split()[2] for line in lines if line.startswith("# HELP longread_engine_")}
    stats = client.app.state.service.engine.stats()  # type: ignore[attr-defined]
    times = {"waiting_seconds", "time_to_first_token_seconds", "time_per_token_seconds"}
    assert {name.removeprefix("longread_engine_").removesuffix("_total") for name in helped} == set(stats) | times


def test_waits_are_histograms(client: TestClient) -> None:
    def histogram(name: str) -> tuple[list[float], list[float], float]:
        """The ends of the buckets, how many took at most as long, and the seconds of all."""
        families = text_string_to_metric_families(client.get("/metrics").text)
        (family,) = (family for family in families if family.name == f"longread_engine_{name}_seconds")
        assert family.type == "histogram"
        buckets = [sample for sample in family.samples if sample.name.endswith("_bucket")]
        (seconds,) = (sample.value for sample in family.samples if sample.name.endswith("_sum"))
        return [float(sample.labels["le"]) for sample in buckets], [sample.value for sample in buckets], seconds

    names = ("waiting", "time_to_first_token", "time_per_token")
    before = {name: histogram(name) for name in names}
    complete(client, prompt=TEXT, max_tokens=5, temperature=0)
    for name, more in zip(names, (1, 1, 4), strict=True):
        (ends, then, seconds), (_, now, later) = before[name], histogram(name)
        assert ends == sorted(ends)
        assert ends[-1] == float("inf")
        assert now == sorted(now)
        assert now[-1] == then[-1] + more
        assert later > seconds


def test_the_tokenizer(client: TestClient) -> None:
    found = post(client, "/tokenize", text="né", bos=True)
    assert found == {"tokens": [BOS, *"né".encode()], "bytes": [0, 1, 1, 1], "count": 4}
    assert post(client, "/tokenize", prompt="a", add_special_tokens=False)["tokens"] == [97]
    assert post(client, "/detokenize", tokens=found["tokens"])["text"] == "né"


def test_a_completion_is_what_the_library_writes(client: TestClient) -> None:
    reader = Session(make_model(), INNER)
    reader.read([BOS, *TEXT.encode()])
    expected = list(reader.generate(9, temperature=0))
    found = complete(client, prompt=TEXT, max_tokens=9, temperature=0)
    assert found["choices"][0]["text"] == bytes(expected).decode(errors="replace")
    assert found["choices"][0]["finish_reason"] == "length"
    read = {"prompt_tokens": len(TEXT) + 1, "completion_tokens": 9, "total_tokens": len(TEXT) + 10}
    assert found["usage"] == read | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_a_seed_repeats_and_choices_differ(client: TestClient) -> None:
    first, again = (complete(client, prompt="ab", n=3, seed=7, max_tokens=12)["choices"] for _ in range(2))
    assert first == again
    assert len({choice["text"] for choice in first}) == 3
    assert [choice["index"] for choice in first] == [0, 1, 2]
    alone, other = (complete(client, prompt="ab", seed=seed, max_tokens=12)["choices"][0]["text"] for seed in (7, 8))
    assert alone == first[0]["text"]
    assert other not in [choice["text"] for choice in first]


def test_prompts_in_every_form(client: TestClient) -> None:
    ids = [BOS, *b"ab"]
    forms: list[Any] = ["ab", ["ab"], ids, [ids], ["ab", "ab"], [ids, ids]]
    texts = [[c["text"] for c in complete(client, prompt=p, seed=3, max_tokens=8)["choices"]] for p in forms]
    assert len({text for found in texts for text in found}) == 1
    assert list(map(len, texts)) == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("learn", [True, False])
def test_echo_scores_the_prompt(client: TestClient, learn: bool) -> None:
    found = complete(client, prompt=TEXT, echo=True, logprobs=2, max_tokens=0, learn=learn)["choices"][0]
    assert found["text"] == TEXT
    logprobs = found["logprobs"]
    assert logprobs["tokens"] == list(TEXT)
    assert logprobs["text_offset"] == list(range(len(TEXT)))
    assert logprobs["token_logprobs"] == pytest.approx([-x for x in direct(TEXT, learn=learn)], abs=1e-5)
    for token, logprob, top in zip(TEXT, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert 2 <= len(top) <= 3


def test_what_is_likeliest_is_so(client: TestClient) -> None:
    """The likeliest tokens of a prompt's places, against the library's own logits."""
    from longread.inner_loop import next_token_logits

    reader, likeliest = Session(make_model(), INNER), []
    for token in [BOS, *TEXT[:40].encode()]:
        reader.read([token])
        likeliest.append(next_token_logits(reader.model, reader.state)[0].log_softmax(-1).topk(2))
    ids = [BOS, *TEXT[:40].encode()]
    found = complete(client, prompt=ids, echo=True, logprobs=2, max_tokens=1, temperature=0)["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    for top, expected in zip(found["top_logprobs"][1:], likeliest, strict=True):
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())


def test_a_streamed_completion_is_the_same(client: TestClient) -> None:
    body = {"model": "tiny", "prompt": ["ab", "cd"], "n": 2, "seed": 5, "max_tokens": 10, "logprobs": 1, "echo": True}
    whole = client.post("/v1/completions", json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    found = events(client.post("/v1/completions", json=body | options))
    assert found.pop() == ("", "[DONE]")
    assert found.pop()[1]["usage"] == whole["usage"]
    chunks = [chunk["choices"][0] for _, chunk in found]
    for choice in whole["choices"]:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        joined = {name: [x for chunk in mine for x in chunk["logprobs"][name]] for name in choice["logprobs"]}
        for name in ("tokens", "text_offset"):
            assert joined[name] == choice["logprobs"][name]
        for name in ("token_logprobs", "top_logprobs"):  # other requests in the batch move the last bits
            assert joined[name] == [pytest.approx(x, abs=1e-5) for x in choice["logprobs"][name]]
        assert [chunk["finish_reason"] for chunk in mine] == [None] * (len(mine) - 1) + ["length"]


def test_a_stop_text_ends_and_is_left_out(client: TestClient) -> None:
    whole = complete(client, prompt="ab", seed=1, max_tokens=60)["choices"][0]["text"]
    stop = next(whole[i : i + 2] for i in range(20, 58) if whole[i : i + 2].isascii())
    ended = complete(client, prompt="ab", seed=1, max_tokens=60, stop=["never there", stop])["choices"][0]
    assert ended["text"] == whole[: whole.index(stop)]
    assert ended["finish_reason"] == "stop"
    body = {"model": "tiny", "prompt": "ab", "seed": 1, "max_tokens": 60, "stop": stop, "stream": True}
    chunks = [chunk["choices"][0] for _, chunk in events(client.post("/v1/completions", json=body))[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == ended["text"]


def test_a_chat_is_a_text_with_names(client: TestClient) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "?"}]},
    ]
    body = {"messages": messages, "seed": 2, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    found = post(client, "/v1/chat/completions", model="tiny", **body)
    text = complete(client, prompt="Be kind.\n\nUser: Hello?\n\nAssistant:", seed=2, max_tokens=12, stop="\n\nUser:")
    assert found["choices"][0]["message"]["content"] == text["choices"][0]["text"]
    entries = found["choices"][0]["logprobs"]["content"]
    assert len(entries) == found["usage"]["completion_tokens"] == 12
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    stream = client.post("/v1/chat/completions", json={"model": "tiny", "stream": True, **body})
    deltas = [chunk["choices"][0]["delta"] for _, chunk in events(stream)[:-1]]
    assert "".join(delta["content"] for delta in deltas) == found["choices"][0]["message"]["content"]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature", "temperature is -1; it must be at least 0"),
        ({"prompt": "x", "temperature": 1000}, "temperature", "temperature is 1000; it must be at most 100"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens", 'max_tokens is "many"; it must be a whole number'),
        ({"prompt": "x", "max_tokens": True}, "max_tokens", "max_tokens is true; it must be a whole number"),
        ({"prompt": "x", "logprobs": False}, "logprobs", "logprobs is false; it must be a whole number"),
        ({"prompt": "x", "temperature": "1"}, "temperature", 'temperature is "1"; it must be a number'),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens is -1; it must be at least 0"),
        ({"prompt": "x", "top_p": 0}, "top_p", "top_p is 0; it must be above 0"),
        ({"prompt": "x", "stream": "perhaps"}, "stream", 'stream is "perhaps"; it must be true or false'),
        ({"prompt": "x", "stream_options": 5}, "stream_options", "stream_options is 5; it must be an object"),
        ({"prompt": 5}, "prompt", "prompt is 5; it must be a text, a list of texts, a list of token ids, or"),
        ({"prompt": [1, -1]}, "prompt[1]", "prompt[1] is -1; it must be at least 0"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]", 'prompt[1][0] is "a"; it must be a whole number'),
        ({"prompt": "x", "stop": 7}, "stop", "stop is 7; it must be a text, or a list of texts"),
        ({"prompt": "x", "n": 0}, "n", "n is 0; it must be at least 1"),
        ({"prompt": "x", "colour": 1}, "colour", "there is no argument colour"),
        (
            {"prompt": "x", "presence_penalty": 1},
            "presence_penalty",
            "presence_penalty is 1; it must be 0, and",
        ),
        ({"prompt": "x", "suffix": "y"}, "suffix", "left to right"),
        ({"prompt": [3, 257]}, "prompt", "token id 257 is not in the vocabulary of 257"),
        ({"prompt": []}, "prompt", "a prompt has no tokens; give at least one"),
        ({"prompt": [[]]}, "prompt", "a prompt has no tokens; give at least one"),
        ({"prompt": "x", "n": 1_000_000}, "n", "1000000 choices, n of each prompt, are more than 128; send several"),
        ({"prompt": "x", "stop": [""]}, "stop", "empty"),
        ({"prompt": "x", "stop": ["a"] * 5}, "stop", "up to 4"),
    ],
)
def test_a_wrong_completion_says_what_is_wrong(
    client: TestClient, body: dict[str, Any], param: str, words: str
) -> None:
    error = complete(client, 400, **body)["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert str(error["param"]).startswith(param)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages has 0 entries; it must have at least 1"),
        ([{"role": "x", "content": "y"}], "messages[0].role is \"x\"; it must be 'system', 'developer', 'user' or"),
        ([{"role": "user"}], "messages[0].content is missing; this request needs it"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5; it must be a text, or a list of text parts"),
    ],
)
def test_a_wrong_chat_says_what_is_wrong(client: TestClient, messages: list[Any], words: str) -> None:
    error = post(client, "/v1/chat/completions", 400, model="tiny", messages=messages)["error"]
    assert words in error["message"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "no valid JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "surrogate"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature"),
        (b"\xff\xfe", ""),
        (b"", "the body is missing; send a JSON object"),
        (b"[]", "the body is a list of 0; it must be an object"),
        (b'{"prompt": "x"}', "model is missing; this request needs it"),
        (b'{"model": "tiny", "\\ud800": 1}', "there is no argument"),
    ],
)
def test_hostile_json(client: TestClient, content: bytes, words: str) -> None:
    answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
