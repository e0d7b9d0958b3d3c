"""The OpenAPI document, and schemathesis, which sends what the document allows and what it forbids."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from longread.server.errors import _CODES
from tests.server import TEXT, Process, serving

LIMITS = (
    "--limit",
    "tokens=300",
    "--limit",
    "per_minute=1000000",
    "--limit",
    "sessions=100000",
    "--limit",
    "seconds=20",
)
EXAMPLES = 40


def test_the_document_says_what_every_route_may_answer(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], f"{method} {path}"
            assert operation["description"], f"{method} {path}"
            assert {"401", "429", "503"} <= set(operation["responses"])
            for status, answer in operation["responses"].items():
                if status >= "400":
                    assert "ErrorReply" in str(answer["content"]["application/json"]["schema"]), f"{method} {path}"


def test_the_page_of_documentation_lists_every_route_and_every_status(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    routes, errors = text.partition("## Endpoints")[2].partition("**Errors**")[::2]
    with serving(tmp_path) as client:
        paths = client.get("/openapi.json").json()["paths"]
    for path in [*paths, "/openapi.json"]:
        assert path.replace("{session}", "{id}") + "`" in routes
    statuses = errors.partition("with status ")[2].partition(". ")[0]
    assert sorted(map(int, re.findall(r"\d+", statuses))) == sorted(_CODES)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, str]]]:
    """The document of a server that runs, and what there is: a session, a response, a conversation and its item."""
    with Process(tmp_path_factory.mktemp("home"), *LIMITS) as server:
        ids = {kind: server.client.post(f"/v1/{kind}s").json()["id"] for kind in ("session", "conversation")}
        server.client.post(f"/v1/sessions/{ids['session']}/append", json={"text": TEXT}).raise_for_status()
        body = {"input": "Who?", "max_output_tokens": 3}
        said = {"items": [{"role": "user", "content": "Who?"}]}
        ids["response"] = server.client.post("/v1/responses", json=body).json()["id"]
        items = server.client.post(f"/v1/conversations/{ids['conversation']}/items", json=said).json()
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json"), ids | {"item": items["first_id"]}
        assert "Traceback" not in "".join(server.log)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=str)
def test_every_answer_is_one_that_the_document_promises(
    document: tuple[Any, dict[str, str]], mode: GenerationMode
) -> None:
    """What the document allows is understood, what it forbids is refused, and no answer is unheard of."""
    schema, ids = document
    turns = itertools.count()

    def check(case: Any) -> None:
        if case.method != "DELETE" and next(turns) % 2:
            case.path_parameters |= {name: one for name, one in ids.items() if f"{{{name}}}" in case.path}
        # a schema cannot say that a token id must be in the vocabulary, or that it is text or tokens
        case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

    quick = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    for operation in schema.get_all_operations():
        with contextlib.suppress(Unsatisfiable):  # nothing is wrong input for a route without any
            quick(given(case=operation.ok().as_strategy(generation_mode=mode))(check))()
