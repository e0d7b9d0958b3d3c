"""Reading: at once, in pieces, and token by token are one computation, and the one that training differentiates."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import Tensor

from longread.inner_loop import ReadingState, begin, captured, next_token_logits, read, reading
from longread.model import Transformer
from longread.outer_loop import end_to_end_loss, static_loss
from tests.tiny import BY_BLOCK, GROUPED, INNER, M, make


def make_wide(**changes: object) -> Transformer:
    model = make(3, torch.float64, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    return model


def tokens(n: int, B: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(19, (B, n), generator=torch.Generator().manual_seed(seed))


def read_in(model: Transformer, text: Tensor, sizes: list[int], learn: bool = True):  # type: ignore[no-untyped-def]
    state, nll, norms, done = begin(model, text.shape[0]), [], [], 0
    for size in sizes:
        result = read(model, state, text[:, done : done + size], inner=INNER, learn=learn)
        state, done = result.state, done + size
        nll.append(result.nll)
        norms.append(result.inner_grad_norm)
    assert done == text.shape[1]
    return state, torch.cat(nll, 1), torch.cat(norms, 1)


def equal_states(a: ReadingState, b: ReadingState) -> None:
    assert a.position == b.position
    for x, y in zip(a.tensors, b.tensors, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 6, 40])
@pytest.mark.parametrize("attention", ["window", "full"])
def test_reading_scores_what_training_scores(window: int, attention: str) -> None:
    model = make_wide(window_size=window, attention=attention)
    text = tokens(5 * M + 1)
    _, nll, norms = read_in(model, text, [5 * M + 1])
    mask = torch.ones_like(text[:, 1:], dtype=torch.bool)
    trained = end_to_end_loss(model, text[:, :-1], text[:, 1:], mask, inner_lr=INNER.lr, inner_clip=INNER.clip)
    assert nll[:, 0].isnan().all()
    torch.testing.assert_close(nll[:, 1:], trained.nll, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norms[:, :-1], trained.inner_grad_norm, rtol=1e-10, atol=1e-12)
    _, frozen, no_norms = read_in(model, text, [5 * M + 1], learn=False)
    static = static_loss(model, text[:, :-1], text[:, 1:], mask)
    torch.testing.assert_close(frozen[:, 1:], static.nll, rtol=1e-10, atol=1e-12)
    assert no_norms.shape == (2, 0)


@pytest.mark.parametrize("length", [1, 2, M - 1, M, M + 1, 2 * M, 2 * M + 1, 3 * M - 1, 5 * M + 2])
@pytest.mark.parametrize("stretch", [pytest.param(M, marks=pytest.mark.slow), 2 * M, 2048])
def test_every_split_is_the_same_reading(length: int, stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STRETCH", stretch)
    model = make_wide()
    text = tokens(length)
    whole = read_in(model, text, [length])
    splits = [[1] * length, [length - 1, 1], [1, length - 1]]
    splits += [[first, length - first] for first in range(M - 1, min(length, 2 * M + 2))]
    splits += [[0, length, 0]]
    for split in splits:
        state, nll, norms = read_in(model, text, [size for size in split if size >= 0])
        torch.testing.assert_close(nll, whole[1], rtol=1e-10, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(norms, whole[2], rtol=1e-10, atol=1e-12)
        equal_states(state, whole[0])


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(
    "options", [{"attention": "full"}, {"num_suffix_blocks": 0}, {"num_suffix_blocks": 1}], ids=str
)
def test_other_networks_read_in_pieces_too(options: dict, learn: bool) -> None:
    model = make_wide(**options)
    text = tokens(3 * M + 2)
    whole, pieces = (read_in(model, text, sizes, learn) for sizes in ([14], [1, 3, 5, 4, 1]))
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-10, atol=1e-12, equal_nan=True)
    equal_states(pieces[0], whole[0])


def test_the_step_waits_for_the_first_token_of_the_next_mini_batch() -> None:
    """Token M − 1 is the last input of the first mini-batch, and token M its last target."""
    model = make_wide()
    text = tokens(M + 1)
    at_m = read(model, begin(model, 2), text[:, :M], inner=INNER)
    assert at_m.inner_grad_norm.shape[1] == 0
    assert torch.equal(at_m.state.fast[0].gate, model.initial_fast_weights(2)[0].gate)
    after = read(model, at_m.state, text[:, M:], inner=INNER)
    assert after.inner_grad_norm.shape[1] == 1
    assert not torch.equal(after.state.fast[0].gate, at_m.state.fast[0].gate)
    # the prediction of token M came from the weights before the step
    expected = -next_token_logits(model, at_m.state).log_softmax(-1).gather(1, text[:, M:])
    torch.testing.assert_close(after.nll, expected, rtol=1e-10, atol=1e-12)


def test_masked_tokens_teach_nothing() -> None:
    model = make_wide()
    text = tokens(2 * M + 1)
    mask = torch.ones_like(text, dtype=torch.bool)
    mask[:, 2] = False
    masked = read(model, begin(model, 2), text, inner=INNER, loss_mask=mask)
    trained = end_to_end_loss(model, text[:, :-1], text[:, 1:], mask[:, 1:], inner_lr=0.7, inner_clip=0.5)
    torch.testing.assert_close(masked.nll[:, 1:], trained.nll, rtol=1e-10, atol=1e-12)


def test_a_frozen_stretch_is_never_learned_from() -> None:
    model = make_wide()
    text = tokens(3 * M + 1)
    learned = read(model, begin(model, 2), text[:, : M + 2], inner=INNER)
    frozen = read(model, learned.state, text[:, M + 2 : M + 4], inner=INNER, learn=False)
    for a, b in zip(frozen.state.fast, learned.state.fast, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    again = read(model, frozen.state, text[:, M + 4 : 2 * M + 4], inner=INNER)
    assert again.inner_grad_norm.shape[1] == 0  # a new mini-batch began after the frozen tokens
    assert read(model, again.state, text[:, :1], inner=INNER).inner_grad_norm.shape[1] == 1


def test_a_state_is_a_value() -> None:
    """Two futures of one past do not disturb each other."""
    model = make_wide()
    start = read(model, begin(model, 2), tokens(M + 2), inner=INNER).state
    copy = [x.clone() for x in start.tensors]
    one = read(model, start, tokens(9, seed=1), inner=INNER)
    read(model, start, tokens(9, seed=2), inner=INNER)
    assert all(torch.equal(x, y) for x, y in zip(start.tensors, copy, strict=True))
    again = read(model, start, tokens(9, seed=1), inner=INNER)
    assert torch.equal(one.nll, again.nll)


def test_reading_keeps_no_graph() -> None:
    model = make_wide()
    result = read(model, begin(model, 2), tokens(5 * M + 2), inner=INNER)
    for tensor in (*result.state.tensors, result.nll, result.inner_grad_norm):
        assert tensor.grad_fn is None
        assert not tensor.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_state_has_one_size_at_any_length() -> None:
    model = make_wide(mini_batch_size=96, window_size=144).float()
    state = begin(model)
    sizes = {}
    for n in (1024, 4096, 16384):
        state = read(model, state, tokens(n - state.position, B=1), inner=INNER).state
        sizes[n] = state.nbytes
        assert max(x.untyped_storage().nbytes() for x in state.tensors) <= 4 * 2 * 8 * (144 + 2048)
    assert len(set(sizes.values())) == 1


def live_bytes() -> int:
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is Tensor)


@pytest.mark.parametrize("thousands", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_memory_is_flat_from_1k_to_64k_tokens(thousands: int) -> None:
    """Tensors alive after reading 1K tokens and after many more: the same bytes."""
    model = make_wide(mini_batch_size=256, window_size=64).float()
    state = read(model, begin(model), tokens(1025, B=1), inner=INNER).state
    after_1k = live_bytes()
    for i in range(thousands - 1):
        state = read(model, state, tokens(1024, B=1, seed=i), inner=INNER).state
    assert state.position == thousands * 1024 + 1
    assert live_bytes() <= after_1k * 1.01


def test_nothing_read_predicts_nothing() -> None:
    model = make_wide()
    with pytest.raises(ValueError, match="nothing has been read"):
        next_token_logits(model, begin(model))
    empty = read(model, begin(model, 3), torch.empty(3, 0, dtype=torch.long), inner=INNER)
    assert empty.nll.shape == (3, 0)
    assert empty.state.position == 0


def test_float32_reading_agrees_with_float64() -> None:
    model = make_wide()
    text = tokens(6 * M + 1)
    wide = read(model, begin(model, 2), text, inner=INNER).nll
    narrow = read(model.float(), begin(model, 2), text, inner=INNER).nll
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-4, equal_nan=True)


def test_fast_weights_are_float32_under_a_half_precision_model() -> None:
    """A step of η g is far below the rounding of bfloat16 weights."""
    model = make_wide()
    text = tokens(6 * M + 1)
    wide = read(model, begin(model, 2), text, inner=INNER).nll
    half = read(model.bfloat16(), begin(model, 2), text, inner=INNER)
    assert all(x.dtype == torch.float32 for block in half.state.fast for x in block)
    assert half.nll.dtype == torch.float32
    torch.testing.assert_close(half.nll.double(), wide, rtol=0.1, atol=0.2, equal_nan=True)


def test_a_reader_that_is_kept_does_not_keep_its_model() -> None:
    model = make_wide()
    reader, gone = captured.CapturedReader(model, 1, INNER), weakref.ref(model)
    assert reader.model is model
    del model
    gc.collect()
    assert gone() is None


def test_states_can_be_replaced_field_by_field() -> None:
    state = begin(make_wide())
    assert dataclasses.replace(state, position=7).position == 7


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": 16},
        {"window_size": 24},
        {"window_size": 40},
        {"window_size": 24} | GROUPED,
        {"window_size": 40} | BY_BLOCK | {"block_windows": (16, 0, 20, 0)},
    ],
    ids=str,
)
def test_replaying_graphs_is_reading(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text on a GPU, captured, against float64 on a CPU; strips wrap several times, and pieces end anywhere."""
    model = make_wide(mini_batch_size=8, width=32, mlp_hidden=32, **changes)
    text = tokens(40 * 8 + 5)
    expected = read_in(model, text, [text.shape[1]])
    model = model.float().cuda()
    replays: list[torch.Size] = []
    monkeypatch.setattr(reading, "STRETCH", 48)  # so that the window is full long before the end
    original = captured.CapturedReader.read
    monkeypatch.setattr(
        captured.CapturedReader, "read", lambda self, *a: replays.append(a[2].shape) or original(self, *a)
    )
    for sizes in ([325], [150, 100, 75], [7, 311, 7]):
        replays.clear()
        state, nll, norms = read_in(model, text.cuda(), sizes)
        assert replays
        torch.testing.assert_close(nll.cpu().double(), expected[1], rtol=0, atol=2e-3, equal_nan=True)
        torch.testing.assert_close(norms.cpu().double(), expected[2], rtol=1e-3, atol=1e-4)
        assert state.position == expected[0].position
        for x, y in zip(state.tensors, expected[0].tensors, strict=True):
            torch.testing.assert_close(x.cpu().double(), y.double(), rtol=0, atol=5e-3)
