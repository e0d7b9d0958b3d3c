"""Reading: what is likeliest, types, shapes and what is kept, and whole mini-batches at once as on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.inner_loop import (
    ReadingState,
    begin,
    captured,
    next_token_logits,
    read,
    reading,
    register_inner_optimizer,
)
from longread.model import Transformer
from tests.fake_graphs import fake_graphs, set_capturing
from tests.tiny import INNER, M, make, text

__all__ = ["fake_graphs"]
V = 19


def exact(**changes: object) -> Transformer:
    return make(3, torch.float64, **changes)


def tokens(n: int, *seeds: int) -> Tensor:
    return torch.tensor([text(n, seed) for seed in seeds or (0,)])


@functools.cache
def token_by_token(learn: bool) -> tuple[Tensor, Tensor]:
    """Of two sequences, as one token after the other is read: the output after each, and log p of the next."""
    model, written = exact(), tokens(13, 0, 1)
    state, outputs, log_p = begin(model, 2), [], []
    for t in range(13):
        state = read(model, state, written[:, t : t + 1], inner=INNER, learn=learn).state
        outputs.append(state.output)
        log_p.append(next_token_logits(model, state).log_softmax(-1))
    return torch.stack(outputs, 1), torch.stack(log_p, 1)


def test_unless_told_otherwise_it_learns_from_every_target_and_looks_for_nothing_else() -> None:
    model = exact()
    found = read(model, begin(model, 2), tokens(2 * M + 3, 0, 1), inner=INNER)
    assert found.top is None
    assert found.rolled_back.dtype == torch.bool
    assert found.rolled_back.tolist() == [[False, False]] * 2
    assert found.inner_grad_norm.shape == (2, 2)
    assert found.state.targets_mask.dtype == torch.bool
    assert found.state.targets_mask.tolist() == [[True, True]] * 2
    nothing = read(model, found.state, tokens(0, 0, 1).long(), inner=INNER)
    assert (nothing.nll.shape, nothing.rolled_back.shape, nothing.top) == ((2, 0), (2, 0), None)


@pytest.mark.parametrize("pieces", [[13], [1, 12], [M, M, 5], [5, 1, 1, 6]], ids=str)
@pytest.mark.parametrize("learn", [True, False])
def test_outputs_are_those_of_the_weights_before_each_step(pieces: list[int], learn: bool) -> None:
    """Of two sequences at once, against the output after every single token."""
    model, written, (expected, _) = exact(), tokens(13, 0, 1), token_by_token(learn)
    state, found = begin(model, 2), []
    for part in written.split(pieces, dim=1):
        made = read(model, state, part, inner=INNER, learn=learn, outputs=True)
        assert made.outputs is not None
        found.append(made.outputs)
        state = made.state
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)
    assert read(model, begin(model, 2), written, inner=INNER, learn=learn).outputs is None


@pytest.mark.parametrize("pieces", [[13], [1, 12], [4, 4, 5], [5, 1, 1, 6]], ids=str)
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(("at_a_time", "top"), [(1, 1), (3, 3), (256, V), (2, 40)])
def test_the_likeliest_are_those_of_the_predictions(
    pieces: list[int], learn: bool, at_a_time: int, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sequences at once, against the logits after every single token; however many are asked for and made."""
    model, written, (_, following) = exact(), tokens(13, 0, 1), token_by_token(learn)
    expected = following[:, :-1]
    monkeypatch.setattr(reading, "LOGITS_AT_A_TIME", at_a_time)
    state, found = begin(model, 2), []
    for part in written.split(pieces, dim=1):
        made = read(model, state, part, inner=INNER, learn=learn, top=top)
        assert made.top is not None
        assert [x.shape for x in made.top] == [(2, part.shape[1], min(top, V))] * 2
        found.append(made.top)
        state = made.state
    log_p, ids = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    assert log_p[:, 0].isnan().all()
    values = expected.sort(-1, descending=True).values[..., :top]
    torch.testing.assert_close(log_p[:, 1:], values, rtol=1e-10, atol=1e-10)
    own = expected.gather(-1, ids[:, 1:])
    torch.testing.assert_close(own, values, rtol=1e-10, atol=1e-10)


def test_the_beginning_is_the_model_s_weights_and_no_graph() -> None:
    model = exact()
    state = begin(model, 3)
    assert (state.position, state.output.shape, state.hidden.shape) == (0, (3, 0), (3, 0, 16))
    assert (state.targets.dtype, state.targets_mask.dtype) == (torch.int64, torch.bool)
    assert not any(x.requires_grad for x in state.tensors)
    later = read(model, state, tokens(M + 1, 0, 1, 2), inner=INNER).state
    assert not any(x.requires_grad for x in state.tensors)  # the step has left the earlier state as it was
    assert not any(x.requires_grad for x in read(model, later, tokens(2 * M, 0, 1, 2), inner=INNER).state.tensors)
    step_last = read(model, begin(model), tokens(M), inner=INNER).state
    finished = read(model, step_last, tokens(1), inner=INNER)
    assert not any(x.requires_grad for x in (*finished.state.tensors, finished.nll, finished.inner_grad_norm))


@pytest.mark.parametrize("n", range(1, 4 * M))
def test_what_is_kept_for_later(n: int) -> None:
    """The window; of attention above the lowest fast weights, the tokens that wait for their step too."""
    model, waiting = exact(), (n - 1) % M + 1
    state = read(model, begin(model), tokens(n), inner=INNER).state
    assert state.hidden.shape == (1, waiting, 16)
    assert state.targets.shape == state.targets_mask.shape == (1, waiting - 1)
    assert [past.key.shape[2] for past in state.lower_pasts] == [min(n, 6)] * 3
    assert [past.key.shape[2] for past in state.upper_pasts] == [min(n, 6 + waiting)]
    frozen = read(model, state, tokens(1), inner=INNER, learn=False).state
    assert frozen.hidden.shape == (1, 0, 16)
    assert [past.key.shape[2] for past in frozen.upper_pasts] == [min(n + 1, 6)]


def test_it_reads_where_its_model_lies() -> None:
    model = make().to("meta")
    found = read(model, begin(model), torch.zeros(1, 2 * M + 1, dtype=torch.long, device="meta"), inner=INNER, top=2)
    assert {x.device.type for x in (found.nll, found.inner_grad_norm, *(found.top or ()), *found.state.tensors)} == {
        "meta"
    }


@pytest.fixture
def mini_batches(fake_graphs: object, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many are read at once as on a GPU, though plainly."""
    found: list[int] = []
    original = captured.CapturedReader.read

    def spied(
        reader: captured.CapturedReader, state: ReadingState, new: Tensor, mask: Tensor, longest: Tensor | None
    ) -> object:
        assert state.hidden.shape[1] in (0, M)
        found.append(new.shape[1] // M)
        return original(reader, state, new, mask, longest)

    monkeypatch.setattr(captured, "WORTH", math.inf)
    monkeypatch.setattr(captured.CapturedReader, "read", spied)
    return found


@pytest.mark.parametrize(
    ("pieces", "counts"),
    [
        ([3 * M + 1], [3]),
        ([3 * M + 3], [3]),
        ([3 * M], [3]),
        ([M], [1]),
        ([M - 1], []),
        ([M + 1, 2 * M + 1], [1, 1]),
        ([M, 2 * M + 1], [1, 2]),
        ([M, M, 2 * M, M], [1, 1, 2, 1]),
        ([M, 1, M], [1]),
        ([2, 3 * M], [2]),
        ([2, M, 1], []),
    ],
    ids=str,
)
def test_whole_mini_batches_are_read_at_once(
    pieces: list[int], counts: list[int], mini_batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none is begun: as many as there are, the last of which may wait, and first the step on one that waits."""
    model, written = exact(), tokens(sum(pieces), 0, 1)
    mask = torch.rand(written.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    with pytest.MonkeyPatch.context() as plain:
        set_capturing(plain, on=False)
        expected = read(model, begin(model, 2), written, inner=INNER, loss_mask=mask, guard=True)
    state, found = begin(model, 2), []
    for part, counted in zip(written.split(pieces, 1), mask.split(pieces, 1), strict=True):
        found.append(read(model, state, part, inner=INNER, loss_mask=counted, guard=True))
        state = found[-1].state
    assert mini_batches == counts
    assert state.position == sum(pieces)
    for a, b in zip(state.tensors, expected.state.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for name in ("nll", "inner_grad_norm", "rolled_back"):
        made = torch.cat([getattr(one, name) for one in found], dim=1)
        torch.testing.assert_close(made, getattr(expected, name), rtol=1e-10, atol=1e-12, equal_nan=True)
    read(model, begin(model, 2), written, inner=INNER, top=1)
    assert mini_batches == counts  # it finds no likeliest tokens


def test_what_is_refused_is_told_by_whoever_reads_whole_mini_batches(mini_batches: list[int]) -> None:
    """Of a rule whose refusals do not follow from the norms, and of the steps before and after those."""

    def every_second(weights: Sequence[Tensor], gradients: Sequence[Tensor], **_: object) -> list[Tensor]:
        odd = torch.arange(len(weights[0])).view(-1, 1, 1) % 2 == 1
        return [torch.where(odd, w + 1e6, w - 1e-3 * g) for w, g in zip(weights, gradients, strict=True)]

    register_inner_optimizer("every_second", every_second)
    model, written, inner = exact(), tokens(5 * M + 2, 0, 1, 2), InnerConfig(optimizer="every_second")
    with pytest.MonkeyPatch.context() as plain:
        set_capturing(plain, on=False)
        expected = read(model, begin(model, 3), written, inner=inner, guard=True)
    begun = read(model, begin(model, 3), written[:, : M - 1], inner=inner, guard=True)
    found = read(model, begun.state, written[:, M - 1 : 4 * M + 1], inner=inner, guard=True)
    last = read(model, found.state, written[:, 4 * M + 1 :], inner=inner, guard=True)
    assert mini_batches == [3]
    told = torch.cat((found.rolled_back, last.rolled_back), 1)
    assert told.tolist() == expected.rolled_back.tolist() == [[False] * 5, [True] * 5, [False] * 5]
    for a, b in zip(last.state.tensors, expected.state.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_first_token_is_predicted_by_nothing() -> None:
    found = read(exact(), begin(exact()), tokens(1), inner=INNER, top=2)
    assert found.nll.dtype == torch.float64
    assert math.isnan(found.nll.item())
    assert read(make(), begin(make()), tokens(1), inner=INNER).nll.dtype == torch.float32


def test_a_mini_batch_that_comes_as_one_goes_through_the_upper_half_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, written, runs = exact(), tokens(4 * M + 1, 0, 1), 0
    upper = Transformer.upper

    def counted(self: Transformer, *args: object, **options: object) -> object:
        nonlocal runs
        runs += 1
        return upper(self, *args, **options)  # type: ignore[arg-type]

    at_once = read(model, begin(model, 2), written, inner=INNER)
    monkeypatch.setattr(Transformer, "upper", counted)
    state = begin(model, 2)
    for part in written.split(M, dim=1):
        state = read(model, state, part, inner=INNER).state
        assert not any(x.requires_grad for x in state.tensors)
    assert runs == 4 + 1
    torch.testing.assert_close(state.tensors, at_once.state.tensors)


def test_a_full_mini_batch_can_be_learned_from_twice_and_with_other_weights() -> None:
    """What is kept of its run serves every reader of that state, and none of another."""
    model, written = exact(), tokens(2 * M + 1, 0)
    full = read(model, begin(model), written[:, :M], inner=INNER).state
    following = written[:, M : M + 1]
    first, second = (read(model, full, following, inner=INNER).state for _ in range(2))
    assert full.run is not None
    assert first.run is None
    changed = tuple(type(block)(*(2 * w for w in block)) for block in full.fast)
    other = read(model, dataclasses.replace(full, fast=changed), following, inner=INNER).state
    plain = read(model, dataclasses.replace(full, fast=changed, run=None), following, inner=INNER).state
    for found, again in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(found, again)
    for found, expected in zip(other.tensors, plain.tensors, strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(other.fast[0].gate, first.fast[0].gate)
    with torch.no_grad():
        model.final_norm.weight.mul_(2)
    later = read(model, full, following, inner=INNER).state
    plain = read(model, dataclasses.replace(full, run=None), following, inner=INNER).state
    for found, expected in zip(later.tensors, plain.tensors, strict=True):
        assert torch.equal(found, expected)
