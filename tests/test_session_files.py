"""Sessions as files: exact and rounded, of one size at any length, moved to other types, and hostile."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longread import files
from longread.config import UserError
from longread.files import FORMAT, digest, read_tensors, write_tensors
from longread.inner_loop.step import matrices
from longread.model import Transformer
from longread.session import KIND, STORAGES, Session, TextPrefix
from tests.tiny import BY_BLOCK, GROUPED, INNER, M, make, text


def after(n: int, model: Transformer | None = None) -> Session:
    session = Session(model or make(), INNER)
    session.read(text(n))
    return session


def test_scoring_is_reading_without_a_trace() -> None:
    session = after(14)
    before = session.describe()
    cost = session.score(text(3 * M, seed=1))
    assert session.describe() == before
    assert torch.equal(cost, session.score(text(3 * M, seed=1)))
    assert torch.equal(cost, session.read(text(3 * M, seed=1)))


def test_a_description_says_what_there_is() -> None:
    session = after(2 * M + 3)
    found = session.describe()
    assert (found.position, found.waiting, found.learn, found.steps, found.rolled_back) == (11, 3, True, 2, 0)
    assert found.nbytes == session.nbytes > found.fast_nbytes == 2 * 3 * 16 * 24 * 4
    assert found.drift == session.drift() > 0
    assert (found.device, found.dtype) == ("cpu", "float32")


def test_a_fork_is_cheap_and_free_while_its_origin_writes() -> None:
    session = after(9)
    assert all(a is b for a, b in zip(session.fork().state.tensors, session.state.tensors, strict=True))
    expected = list(session.fork().generate(8, seed=1))
    other = list(session.fork().generate(8, seed=2))
    writing = session.generate(8, seed=1)
    begun = [next(writing) for _ in range(3)]
    fork = session.fork()
    forked = [*begun, *fork.generate(5, temperature=0)]
    assert [*begun, *writing] == expected
    assert fork.position == session.position == 17
    assert forked[:3] == expected[:3]
    assert other != expected


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("n", [0, 1, M, 5 * M + 3])
@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, {"num_suffix_blocks": 0}, GROUPED, BY_BLOCK], ids=str)
def test_every_storage_comes_back(storage: str, n: int, changes: dict, tmp_path: Path) -> None:
    session = after(n, make(**changes))
    session.save(tmp_path / "s", storage=storage)  # type: ignore[arg-type]
    restored = Session.restore(tmp_path / "s", make(**changes))
    assert restored.describe() == session.describe() or storage != "exact"
    for a, b in zip(restored.state.tensors, session.state.tensors, strict=True):
        assert a.dtype == b.dtype
        if storage == "exact" or not a.is_floating_point():
            assert torch.equal(a, b)
        else:
            assert (a - b).abs().max() <= b.abs().max() / 128 if a.numel() else True
    assert (restored.steps, restored.position) == (session.steps, n)
    assert torch.allclose(restored.read(text(2 * M + 1, 1)), session.read(text(2 * M + 1, 1)), atol=0.1, equal_nan=True)


@pytest.mark.parametrize("n", [0, 1, 3, 6, 7, 50])
def test_the_newest_tokens_come_back(n: int, tmp_path: Path) -> None:
    session, window = after(n), make().config.window_size
    assert session.recent == text(n)[max(0, n - window) :]
    session.save(tmp_path / "s")
    restored = Session.restore(tmp_path / "s", make())
    assert restored.recent == session.recent
    restored.read(text(2, seed=3))
    assert restored.recent == [*session.recent, *text(2, seed=3)][-window:]


def prefix_at(position: int) -> TextPrefix:
    return TextPrefix(position, 7 * position, "0f" * 32, False, 1, 3, "figures")


def test_how_far_it_is_in_a_text_comes_back(tmp_path: Path) -> None:
    session = after(9)
    session.text = prefix_at(9)
    session.save(tmp_path / "s")
    restored = Session.restore(tmp_path / "s", make())
    assert restored.text == prefix_at(9)
    restored.read(text(1))
    assert restored.text is None  # something else has been read since
    restored.save(tmp_path / "s")
    assert Session.restore(tmp_path / "s", make()).text is None


def test_a_file_has_one_size_however_far_it_is_in_a_text(tmp_path: Path) -> None:
    sizes = set()
    for n in (5 * M, 100 * M):
        session = after(n)
        session.text = prefix_at(n)
        session.save(tmp_path / "s")
        sizes.add((tmp_path / "s").stat().st_size)
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_bytes", 5),
        ("num_bytes", "-1".rjust(20)),
        ("sha256", "0" * 63),
        ("sha256", "G" * 64),
        ("whole", True),
        ("figures", "x" * 70_000),
        ("figures", "é"),
        ("segment_position", f"{10**6:20}"),
        ("segment_bytes", f"{10**6:20}"),
    ],
)
def test_a_forged_place_in_a_text_is_refused(name: str, value: object, tmp_path: Path) -> None:
    session = after(9)
    session.text = prefix_at(9)
    session.save(tmp_path / "s")
    forged(tmp_path / "s", lambda tensors, metadata: metadata["text"].update({name: value}))
    with pytest.raises(UserError, match="is not a complete session") as refusal:
        Session.restore(tmp_path / "s", make())
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet", "ttt_kvb"])
def test_recurrent_states_are_checked_and_come_back(mixer: str, tmp_path: Path) -> None:
    model = make(mixer=mixer, num_suffix_blocks=0, num_heads=4, width=32)
    for n in range(2 * M + 2):
        session = after(n, model)
        session.save(tmp_path / "s")
        restored = Session.restore(tmp_path / "s", model)
        assert all(torch.equal(a, b) for a, b in zip(restored.state.tensors, session.state.tensors, strict=True))
    forged(tmp_path / "s", lambda tensors, metadata: tensors.update({max(tensors): torch.zeros(3)}))
    with pytest.raises(UserError, match="is no valid session"):
        Session.restore(tmp_path / "s", model)


def test_delta_loses_less_of_the_fast_weights_than_bfloat16_and_both_are_half_as_large(tmp_path: Path) -> None:
    session, error, size = after(20 * M, make(width=64, mlp_hidden=96)), {}, {}
    for storage in STORAGES:
        session.save(tmp_path / "s", storage=storage)
        size[storage] = (tmp_path / "s").stat().st_size
        pairs = zip(
            matrices(Session.restore(tmp_path / "s", session.model).state.fast),
            matrices(session.state.fast),
            strict=True,
        )
        error[storage] = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
    assert error["exact"] == 0
    assert 0 < error["delta"] < error["bfloat16"] / 5
    assert size["delta"] == size["bfloat16"] < 0.55 * size["exact"]


def test_an_unknown_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="storage is 'zip'; it must be one of exact, bfloat16, delta"):
        after(9).save(tmp_path / "s", storage="zip")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


LONG = {"vocab_size": 19, "width": 4, "num_blocks": 2, "num_heads": 1, "mlp_hidden": 8, "num_suffix_blocks": 1}


@pytest.mark.parametrize("total", [2**18, pytest.param(2**20, marks=pytest.mark.slow)])
def test_a_session_has_one_size_at_any_length(total: int, tmp_path: Path) -> None:
    """In memory and on the disk, to the byte, in every storage."""
    model = make(**LONG, window_size=256, mini_batch_size=1024)
    session, sizes = Session(model, INNER), []
    for position in (16_384, total):
        while session.position < position:
            session.read(text(min(65_536, position - session.position), seed=session.position))
        for storage in STORAGES:
            session.save(tmp_path / storage, storage=storage)
        sizes.append([session.nbytes, *((tmp_path / storage).stat().st_size for storage in STORAGES)])
    assert session.position == total
    assert session.steps == total // 1024 - 1
    assert sizes[0] == sizes[1]


def test_a_session_moves_between_types(tmp_path: Path) -> None:
    """As from a CPU in float64 to a GPU in bfloat16, and back."""
    session = after(14, make().double())
    session.save(tmp_path / "s")
    fingerprint = read_tensors(tmp_path / "s")[1]["model_fingerprint"]
    half = make()
    half.compute_dtype = torch.bfloat16
    restored = Session.restore(tmp_path / "s", half, fingerprint=fingerprint)
    assert {x.dtype for x in restored.state.tensors if x.is_floating_point()} == {torch.bfloat16, torch.float32}
    assert torch.allclose(restored.read(text(20, 1)).double(), session.score(text(20, 1)), atol=0.1)


@pytest.mark.gpu
def test_a_session_moves_between_devices(tmp_path: Path) -> None:
    session = after(14)
    session.save(tmp_path / "s")
    moved = Session.restore(tmp_path / "s", make().cuda())
    assert torch.allclose(moved.read(text(20, 1)).cpu(), session.score(text(20, 1)), atol=1e-2)
    moved.save(tmp_path / "s")
    assert Session.restore(tmp_path / "s", make()).position == 34


def forged(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """A session file with a valid checksum, whose contents somebody has changed on purpose."""
    tensors, metadata = read_tensors(path, kind=KIND)
    change(tensors, metadata)
    write_tensors(path, tensors, metadata, kind=KIND)


def set_tensor(name: str, make_value: Callable[[Tensor], Tensor]) -> Callable[[dict, dict], None]:
    return lambda tensors, metadata: tensors.update({name: make_value(tensors.get(name, torch.zeros(1)))})


def set_entry(name: str, value: object) -> Callable[[dict, dict], None]:
    return lambda tensors, metadata: metadata.update({name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_tensor("fast.0", lambda w: w * math.nan), "fast.0 holds numbers that are not finite"),
        (set_tensor("lower.0.key", lambda x: x + math.inf), "lower.0.key holds numbers that are not finite"),
        (set_tensor("hidden", lambda x: x.double() * 1e300), "hidden holds numbers that are not finite"),
        (set_tensor("fast.0", lambda w: w[:, :-1]), r"fast.0 is F32 \[1, 23, 16\], not .* \[1, 24, 16\]"),
        (set_tensor("fast.0", lambda w: w.int()), "fast.0 is I32"),
        (set_tensor("upper.0.key", lambda x: x[:, :, 1:]), "upper.0.key is F32"),
        (set_tensor("hidden", lambda x: x.repeat(1, 20, 1)[:, :50]), "50 tokens wait in it"),
        (set_tensor("hidden", lambda x: x[0]), "is F32"),
        (set_tensor("recent", lambda x: x + 19), "its recent are not in the vocabulary of 19"),
        (set_tensor("targets", lambda x: x - 19), "its targets are not in the vocabulary of 19"),
        (set_tensor("../../etc/passwd", lambda x: x), "'../../etc/passwd' is no part of one"),
        (set_tensor("x" * 10_000, lambda x: x), "is no part of one"),
        (set_tensor("fast.99", lambda x: x), "'fast.99' is no part of one"),
        (lambda tensors, metadata: tensors.pop("output"), "it has no 'output'"),
        (set_entry("position", f"{5:20}"), "is F32|is I64"),
        (set_entry("position", f"{10**18:20}"), "position is"),
        (set_entry("position", f"{-5:20}"), "position is"),
        (set_entry("position", "9" * 5000), "position is"),
        (set_entry("position", 9), "position is 9, not a number"),
        (set_entry("steps", ["x"]), "steps is"),
        (set_entry("learn", "yes"), "learn is 'yes'"),
        (set_entry("storage", "../x"), "storage '../x'"),
        (set_entry("inner", {"lr": math.nan}), "lr is nan"),
        (set_entry("inner", {"y" * 10_000: 1}), "InnerConfig has no field"),
        (set_entry("inner", {"__class__": 1}), "InnerConfig has no field"),
        (set_entry("model_fingerprint", None), "belongs to another model"),
        (lambda tensors, metadata: metadata.clear(), "not a complete session"),
    ],
)
def test_a_forged_session_is_refused_with_one_sentence(change: Callable, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    after(2 * M + 3).save(path)
    forged(path, change)
    with pytest.raises(UserError, match=reason) as refusal:
        Session.restore(path, make())
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def raw(path: Path, header: bytes, *, claims: int | None = None, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header) if claims is None else claims) + header + body)


@pytest.mark.parametrize(
    ("header", "claims", "reason"),
    [
        (b"{}", 2**63, "truncated|no safetensors"),
        (b"{" + b" " * 40, 2**40, "truncated"),
        (b"[" * 100_000, None, "damaged|no safetensors"),
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', None, "damaged|truncated"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400000000000]}}', None, "truncated|damaged"),
        (b'{"__metadata__":{"longread":"{}"}}', None, "not written by Longread"),
        (json.dumps({"__metadata__": {FORMAT: "[" * 50_000}}).encode(), None, "not written by Longread"),
        (json.dumps({"__metadata__": {FORMAT: '{"format_version":1,"metadata":[]}'}}).encode(), None, "no table"),
        (json.dumps({"__metadata__": {FORMAT: '{"format_version":1,"metadata":{}}'}}).encode(), None, "holds None"),
        (json.dumps({"__metadata__": {FORMAT: '{"format_version":99,"metadata":{}}'}}).encode(), None, "upgrade"),
    ],
)
def test_a_hostile_header_is_refused_with_one_sentence(
    header: bytes, claims: int | None, reason: str, tmp_path: Path
) -> None:
    raw(tmp_path / "s", header, claims=claims)
    with pytest.raises(UserError, match=reason):
        Session.restore(tmp_path / "s", make())


def test_a_huge_header_is_not_even_parsed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    raw(path, b"{", claims=2**26)
    os.truncate(path, 2**27)  # a hole: it costs no disk
    with pytest.raises(UserError, match="has a header of 67108864 bytes, more than"):
        Session.restore(path, make())


def test_a_file_that_is_larger_than_any_session_is_not_read(tmp_path: Path) -> None:
    """A hole of a terabyte, declared as a tensor: refused by its header alone."""
    path, size = tmp_path / "s", 2**40
    after(9).save(path)
    _, metadata = read_tensors(path)
    entry = json.dumps({"format_version": 1, "kind": KIND, "metadata": metadata, "sha256": digest({}, {})})
    tensors = {"fast.0": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    raw(path, json.dumps({"__metadata__": {FORMAT: entry}, **tensors}).encode())
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.fail("this file system has no holes", pytrace=False)
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"is F32|has no|more than fit into memory"):
        Session.restore(path, make())
    assert time.perf_counter() - started < 2


def test_a_session_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    session = after(9)
    session.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    for w in matrices(session.state.fast):
        w.fill_(math.nan)
    with pytest.raises(UserError, match=r"fast\.0 holds numbers that are not finite"):
        session.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before


def test_models_have_short_headers(tmp_path: Path) -> None:
    """The limit leaves room for a session of any model."""
    after(9, make(num_blocks=64, num_suffix_blocks=64)).save(tmp_path / "s")
    length = struct.unpack("<Q", (tmp_path / "s").read_bytes()[:8])[0]
    assert length < files.MOST_HEADER_BYTES / 100
