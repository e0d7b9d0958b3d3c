"""Files of sessions on their way over HTTP: nothing is whole in memory where a block is enough."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

from longread.engine import Engine
from longread.server.service import Service
from longread.server.sessions.transfer import _Passing, _received
from longread.tokenizer import ByteTokenizer
from tests.test_engine_batches import INNER, make
from tests.test_engine_copies import peak


def test_uploads_and_downloads_pass_in_blocks(tmp_path: Path) -> None:
    block, count = bytes(2**18), 64

    class Upload:
        async def stream(self) -> AsyncIterator[bytes]:
            for _ in range(count):
                yield block

    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(len(message.get("body", b"")))

    async def both() -> None:
        async with _received(service, cast("Any", Upload())) as path:
            assert path.stat().st_size == count * len(block)
            scope = {"type": "http", "method": "GET", "headers": []}
            await _Passing(path)(scope, asyncio.Event().wait, send)

    with Engine(make(), INNER) as engine:
        service = Service(
            engine, ByteTokenizer(), engine.model.config, "tiny", engine.fingerprint, "cpu", tmp_path / "passing"
        )
        service.tidy()
        assert peak(lambda: asyncio.run(both())) < count * len(block) / 8
    assert sum(sent) == count * len(block)
