"""A reading that stands still now and then: in the same places always, and as if it had not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longread.inner_loop import Decoder, Reading, begin, read
from longread.model import Transformer
from tests.tiny import INNER, M, make, text

NETWORKS = {
    "window": {},
    "hybrid": {"attention": "hybrid", "num_blocks": 6},
    "recurrent": {"mixer": "mamba2", "num_suffix_blocks": 0},
}
networks = pytest.mark.parametrize("changes", [pytest.param(value, id=name) for name, value in NETWORKS.items()])
START = 3 * M


def reading(
    model: Transformer, n: int, pause: Callable[[], None] | None = None, *, start: int = START, learn: bool = True
) -> Reading:
    """A text of `start` tokens that is read without pauses, and then n more."""
    tokens = torch.tensor([text(start + n), text(start + n, 1)])
    state = read(model, begin(model, 2), tokens[:, :start], inner=INNER).state
    return read(model, state, tokens[:, start:], inner=INNER, learn=learn, guard=True, top=3, pause=pause)


def numbers(found: Reading) -> list[Tensor]:
    return [found.nll, found.inner_grad_norm, *(found.top or ()), *found.state.tensors]


def assert_equal(some: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@networks
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("start", [START, START + 1])
def test_what_is_done_in_a_pause_changes_no_bit(changes: dict[str, object], learn: bool, start: int) -> None:
    """Neither of the reading, nor of what is read and written in its pauses."""
    model, others, writer = make(0, torch.float64, **changes), list[list[Tensor]](), list[Tensor]()
    expected = numbers(reading(model, 7 * M + 1, start=start, learn=learn))

    def decoder() -> Decoder:
        return Decoder(model, read(model, begin(model), torch.tensor([text(3)]), inner=INNER).state, inner=INNER)

    def write(decoder: Decoder) -> Tensor:
        decoder.read(torch.tensor([7]))
        return decoder.logits()

    writing = decoder()

    def pause() -> None:
        assert not torch.is_grad_enabled()
        if not others:
            others.append(numbers(reading(model, M + 1)))
        writer.append(write(writing))

    found = numbers(reading(model, 7 * M + 1, pause, start=start, learn=learn))
    assert len(writer) > 2
    assert_equal(found, expected)
    assert_equal(others[0], numbers(reading(model, M + 1)))
    again = decoder()
    assert_equal(writer, [write(again) for _ in writer])


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_it_pauses_once_between_two_mini_batches_of_work(learn: bool, n: int) -> None:
    """As often as somebody else would have a turn if it were read mini-batch by mini-batch."""
    pauses = list[int]()
    reading(make(0, num_blocks=8), n * M, lambda: pauses.append(1), learn=learn)
    assert len(pauses) == n - 1


def test_pauses_lie_between_blocks_below_and_between_mini_batches_above() -> None:
    """Never more than one mini-batch of the upper half after another, though all of the lower half came before."""
    model, order, tokens = make(0, num_blocks=8), list[str](), torch.tensor([text(11 * M)])
    state = read(model, begin(model), tokens[:, :START], inner=INNER).state
    for block in model.prefix:
        block.static_mlp.register_forward_hook(lambda *_: order.append("lower"))
    model.final_norm.register_forward_hook(lambda *_: order.append("upper"))
    read(model, state, tokens[:, START:], inner=INNER, pause=lambda: order.append("pause"))
    assert order.count("lower") == 6
    parts = " ".join(order).split("pause")
    assert len(parts) == 8
    assert max(part.count("upper") for part in parts) <= 2
    assert max(part.count("lower") for part in parts) < 6


def test_what_a_pause_raises_ends_the_reading() -> None:
    model = make(0)

    def pause() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        reading(model, 8 * M, pause)
    assert torch.isfinite(reading(model, 8 * M).nll).all()
