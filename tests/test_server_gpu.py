"""The server as a process that has a GPU."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longread.engine import largest_session

pytest.importorskip("httpx2", reason="the client of the server's tests comes with `make test`")
from tests.server import TEXT, M, Process, direct, make_model

TEXTS = ["".join(random.Random(i).sample(TEXT, len(TEXT))) for i in range(8)]


def scores(server: Process, ids: list[str]) -> list[list[float]]:
    asked = {"text": "and then", "bin": 1}
    return [server.client.post(f"/v1/sessions/{one}/score", json=asked).json()["bins"]["nll"] for one in ids]


@pytest.mark.gpu
def test_a_server_on_a_gpu(tmp_path: Path) -> None:
    """In bfloat16, with more sessions than the device and the host may hold, and killed in between."""
    size = largest_session(make_model()) / 2**30
    room = ("--device-memory", f"{3 * size:.12f}", "--host-memory", f"{2 * size:.12f}")
    with Process(tmp_path, *room, device="cuda") as server:
        ids = [server.client.post("/v1/sessions").json()["id"] for _ in TEXTS]
        with ThreadPoolExecutor(8) as clients:
            read = clients.map(
                lambda one, text: server.client.post(f"/v1/sessions/{one}/append", json={"text": text}), ids, TEXTS
            )
            assert {answer.raise_for_status().json()["position"] for answer in read} == {1 + len(TEXT)}
        for found, text in zip(scores(server, ids), TEXTS, strict=True):
            assert found == pytest.approx(direct("and then", before=text), abs=0.1)
        with ThreadPoolExecutor(8) as clients:
            written = clients.map(
                lambda one: server.client.post(f"/v1/sessions/{one}/generate", json={"max_tokens": 2 * M + 3}), ids
            )
            counts = [len(answer.raise_for_status().json()["tokens"]) for answer in written]
        before = scores(server, ids)
        assert "Traceback" not in "".join(server.log)
        server.process.kill()
    with Process(tmp_path, *room, device="cuda") as server:
        positions = [server.client.get(f"/v1/sessions/{one}").json()["position"] for one in ids]
        assert positions == [1 + len(TEXT) + count for count in counts]
        for one, other in zip(scores(server, ids), before, strict=True):
            assert one == pytest.approx(other, abs=0.1)
        assert server.stop() == 0
        assert "Traceback" not in "".join(server.log)
