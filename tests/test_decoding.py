"""Decoding: attention over a ring, and states that change in place, against reading token by token."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.inner_loop import Decoder, begin, captured, next_token_logits, places, read
from longread.model import Past, Ring, Transformer
from longread.ops import fusible
from longread.ops.attention.reference import reference_attention
from longread.ops.attention.ring import plain_ring_attention, ring_attention
from longread.session import Session
from tests.tiny import BY_BLOCK, GROUPED, INNER, M, make


def make_wide(**changes: object) -> Transformer:
    return make(3, torch.float64, **changes)


def tokens(n: int, B: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(19, (B, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["plain", "triton"])
def attend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    if request.param == "plain":
        return plain_ring_attention
    request.getfixturevalue("interpreter")
    return importlib.import_module("longread.ops.attention.ring_triton").triton_ring_attention


@pytest.mark.parametrize(
    ("N", "G", "H", "R", "window"),
    [
        (2, 2, 8, 40, 33),
        pytest.param(2, 2, 20, 131, 131, marks=pytest.mark.slow),
        pytest.param(2, 2, 80, 70, 64, marks=pytest.mark.slow),
        pytest.param(2, 2, 16, 600, None, marks=pytest.mark.slow),
        (6, 2, 20, 131, 131),
        pytest.param(4, 1, 80, 70, 64, marks=pytest.mark.slow),
        (10, 2, 256, 20, 19),  # more heads than a program serves
        (5, 1, 16, 600, None),
    ],
    ids=str,
)
def test_a_ring_is_attention_over_its_newest_tokens(  # type: ignore[no-untyped-def]
    attend, N: int, G: int, H: int, R: int, window: int | None
) -> None:
    """Sequences at different positions, of which some have filled the ring; slots never written are not looked at."""
    positions = [0, 3, R - 1] + ([R, 2 * R + 7] if window else [])
    generator = torch.Generator().manual_seed(H)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (len(positions), G, max(positions) + 1, H)
    text = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    query = torch.randn(shape[0], N, 1, H, generator=generator, dtype=torch.float64)
    ring = Ring(*torch.full((2, len(positions), G, R, H), torch.nan), torch.tensor(positions))
    new = torch.stack([text[:, b, :, p : p + 1] for b, p in enumerate(positions)], 1)
    for b, position in enumerate(positions):
        one = Ring(ring.key[b : b + 1], ring.value[b : b + 1], ring.position[b : b + 1])
        kept = min(position, R)
        one.put(Past(*text[:, b : b + 1, :, position - kept : position].float()), position)
    if attend is plain_ring_attention:  # what is not visible is multiplied with 0 there
        ring = Ring(ring.key.nan_to_num(), ring.value.nan_to_num(), ring.position)
    places = [x.to(device) for x in ring]
    given = [x.float().to(device) for x in (query, *new)]
    out = attend(*given, places[:2], places[2], window=window).cpu()
    for b, position in enumerate(positions):
        k, v = text[:, b : b + 1, :, : position + 1]
        k_of_each, v_of_each = (x.repeat_interleave(N // G, 1) for x in (k, v))
        seen = slice(0 if window is None else max(0, position + 1 - window), None)
        expected = reference_attention(
            query[b : b + 1],
            k_of_each[:, :, -1:],
            v_of_each[:, :, -1:],
            past=(k_of_each[:, :, seen][:, :, :-1], v_of_each[:, :, seen][:, :, :-1]),
            window=None,
        )
        torch.testing.assert_close(out[b : b + 1].double(), expected, rtol=1e-4, atol=1e-5)
        held = Ring(places[0].cpu()[b : b + 1], places[1].cpu()[b : b + 1], ring.position)
        newest = held.take(min(position + 1, R), position + 1)
        for x, y in zip(newest, (k, v), strict=True):
            assert torch.equal(x, y[:, :, -R:].float())


def test_float64_is_never_left_to_a_kernel() -> None:
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    ring = torch.zeros(2, 1, 1, 3, 4, dtype=torch.float64)
    out = ring_attention(x, x, x, (ring[0], ring[1]), torch.tensor([0]), window=3)
    assert torch.allclose(out, x)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(changes, marks=pytest.mark.slow) for changes in ({}, {"attention": "full"})),
        {"attention": "hybrid", "num_blocks": 6},
        {"num_suffix_blocks": 0},
        GROUPED,
        BY_BLOCK,
        pytest.param({"attention": "full"} | BY_BLOCK, marks=pytest.mark.slow),
        {"attention_soft_cap": 0.5, "logit_soft_cap": 1.0},
    ],
    ids=str,
)
def test_decoding_is_reading_token_by_token(changes: dict, learn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SPARE", 5)  # so that room runs out
    model, text = make_wide(**changes), tokens(3 * M + 3)
    for begun in (1, M - 1, M, M + 1, 2 * M + 2):
        state = read(model, begin(model, 2), text[:, :begun], inner=INNER, learn=learn).state
        decoder = Decoder(model, state, INNER, learn=learn)
        for i in range(begun, text.shape[1]):
            torch.testing.assert_close(decoder.logits(), next_token_logits(model, state), rtol=1e-10, atol=1e-10)
            decoder.read(text[:, i])
            state = read(model, state, text[:, i : i + 1], inner=INNER, learn=learn).state
            assert decoder.position == state.position
            for x, y in zip(decoder.state().tensors, state.tensors, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow), GROUPED | {"pre_norm": False}, BY_BLOCK | {"qk_norm": False}],
    ids=str,
)
def test_decoding_by_kernels_is_reading(changes: dict, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one sequence, whose products are all theirs, in float32 against float64; an inner step between."""
    model, text = make(3, torch.float32, **changes), tokens(2 * M + 2, B=1)
    wide = copy.deepcopy(model).double()
    monkeypatch.setattr(importlib.import_module("longread.ops.gemv.triton"), "PROGRAMS", 1)  # the interpreter's time
    begun = 2 * M - 1
    state = read(model, begin(model), text[:, :begun], inner=INNER).state
    expected = read(wide, begin(wide), text[:, :begun], inner=INNER).state
    decoder = Decoder(model, state, INNER)
    calls = []
    for op in ("longread.ops.gemv", "longread.ops.attention.ring"):
        monkeypatch.setattr(importlib.import_module(op), "fusible", lambda *tensors: calls.append(tensors) or True)
    for i in range(begun, text.shape[1]):
        torch.testing.assert_close(decoder.logits().double(), next_token_logits(wide, expected), rtol=1e-3, atol=1e-4)
        decoder.read(text[:, i])
        expected = read(wide, expected, text[:, i : i + 1], inner=INNER).state
    torch.testing.assert_close(decoder.logits().double(), next_token_logits(wide, expected), rtol=1e-3, atol=1e-4)
    assert len(calls) >= 5 * model.config.num_blocks


@pytest.mark.parametrize("fault", ["", "wrong", "do not run"])
def test_kernels_are_compared_with_plain_pytorch_before_they_are_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    plain, passes = [False], list[bool]()

    @contextlib.contextmanager
    def without() -> Iterator[None]:
        plain[0] = True
        yield
        plain[0] = False

    def decode(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        passes.append(plain[0])
        if fault == "do not run" and not plain[0]:
            raise RuntimeError("out of registers")
        *others, logits = model_decode(*args, **options)
        return *others, logits.roll(1, -1) if fault and not plain[0] else logits

    model_decode = places.decode
    monkeypatch.setattr(places, "can_capture", lambda device: True)
    monkeypatch.setattr(places, "without_kernels", without)
    monkeypatch.setattr(places, "decode", decode)
    model, text = make(3, torch.float32), tokens(4, B=3)
    decoder = Decoder(model, read(model, begin(model, 3), text[:, :2], inner=INNER).state, INNER)
    for i in (2, 3):
        decoder.read(text[:, i])
    expected = next_token_logits(model, read(model, begin(model, 3), text, inner=INNER).state)
    torch.testing.assert_close(decoder.logits(), expected, rtol=1e-4, atol=1e-4)
    assert passes == [True, False, bool(fault), bool(fault)]
    assert [warning.category for warning in recwarn] == [places.KernelsRefused] * bool(fault)


def test_nothing_is_fused_where_kernels_are_unwanted() -> None:
    there = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    before = fusible.fusible(there)
    with fusible.without_kernels():
        assert not fusible.fusible(there)
        with fusible.without_kernels():
            pass
        assert not fusible.fusible(there)
    assert fusible.fusible(there) == before


def test_writers_of_one_model_take_turns() -> None:
    model = make_wide()
    alone = []
    for seed in (1, 2):
        session = Session(model, INNER)
        session.read(tokens(9, 1, seed)[0])
        alone.append(list(session.generate(3 * M, seed=seed)))
    writers = []
    for seed in (1, 2):
        session = Session(model, INNER)
        session.read(tokens(9, 1, seed)[0])
        writers.append(session.generate(3 * M, seed=seed))
    assert [list(pair) for pair in zip(*zip(*writers, strict=True), strict=True)] == alone


def test_a_session_can_be_used_while_it_writes() -> None:
    plain, disturbed = (Session(make_wide(), INNER) for _ in range(2))
    for session in (plain, disturbed):
        session.read(tokens(9, 1)[0])
    expected = list(plain.generate(12, seed=0))
    written = []
    for token in disturbed.generate(12, seed=0):
        written.append(token)
        assert disturbed.position == 9 + len(written)
        fork = disturbed.fork()
        fork.read([1, 2])
        assert disturbed.drift() >= 0
    assert written == expected
    disturbed.learn = plain.learn = False
    assert list(disturbed.generate(5, seed=1)) == list(plain.generate(5, seed=1))


def test_places_follow_a_model_that_is_cast() -> None:
    def written(model: Transformer) -> list[int]:
        session = Session(model, INNER)
        session.read(tokens(9, 1)[0])
        return list(session.generate(6, temperature=0))

    model = make_wide()
    written(model)
    assert written(model.float()) == written(make_wide().float())


def test_places_do_not_keep_their_model() -> None:
    model = make_wide()
    state = read(model, begin(model, 1), tokens(3, 1), inner=INNER).state
    Decoder(model, state, INNER).read(torch.tensor([1]))
    gone = weakref.ref(model)
    del model, state
    gc.collect()
    assert gone() is None


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, GROUPED], ids=str)
def test_captured_decoding_is_reading(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SPARE", 16)
    model, text = make_wide(width=32, mini_batch_size=8, window_size=24, **changes), tokens(66)
    state = read(model, begin(model, 2), text, inner=INNER).state
    expected = next_token_logits(model, state)
    model = model.float().cuda()
    decoder = Decoder(model, read(model, begin(model, 2), text[:, :5].cuda(), inner=INNER).state, INNER)
    for i in range(5, 66):
        decoder.read(text[:, i].cuda())
    readers = captured._READERS.get(model, {}).values()
    assert [len(reader._upper_graphs._graphs) for reader in readers] == ([] if "attention" in changes else [1])
    assert decoder.steps == 8
    assert decoder.rolled_back.item() == 0
    torch.testing.assert_close(decoder.logits().cpu().double(), expected, rtol=0, atol=2e-3)
    for x, y in zip(decoder.state().tensors, state.tensors, strict=True):
        torch.testing.assert_close(x.cpu().double(), y.double(), rtol=0, atol=5e-3)
