"""Tokens that are kept beyond the window: chosen as the definition says, causally, and alike however a text is read."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from longread.inner_loop import ReadingState, begin, kept as kept_module, read
from longread.inner_loop.reading import Reading
from longread.model import Transformer
from longread.model.mixers import attention as attention_module
from longread.ops.attention.reference import reference_attention
from tests.tiny import GROUPED, INNER, M, make, text

W, T = 8, 46
KEPT = {"window_size": W, "kept_tokens": 5, "kept_run": 2, "kept_distance": 2 * T}


@pytest.fixture(autouse=True)
def _most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokens of these models cost more, and some less, so that few runs are alike."""
    monkeypatch.setattr(kept_module, "MOST", 3.1)


def wide(**changes: object) -> Transformer:
    """Weights large enough that attention chooses."""
    model = make(3, torch.float64, **(KEPT | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    return model


def in_pieces(model: Transformer, ids: Tensor, lengths: list[int], *, learn: bool) -> Reading:
    state, parts = begin(model, len(ids)), []
    for piece in ids.split(lengths, 1):
        found = read(model, state, piece, inner=INNER, learn=learn)
        state = found.state
        parts.append(found.nll)
    return found._replace(nll=torch.cat(parts, 1))


def rows(*seeds: int, n: int = T) -> Tensor:
    return torch.tensor([text(n, seed) for seed in seeds])


def kept_by_definition(nll: list[float], position: int, count: int, run: int) -> list[int]:
    """Positions that a mini-batch which begins at `position` keeps of the text before, whose tokens cost `nll`, having
    dropped before what earlier ones did not keep."""

    def cost(q: int) -> float:
        return 1e6 if q == 0 else min(nll[q], kept_module.MOST) if q > 0 else 0.0

    def surprise(p: int, length: int, window: range) -> float:
        """Of the runs of that length which hold p, and have been read."""
        usual = sum(kept_module.MOST if q == 0 else cost(q) for q in window) / len(window)
        runs = [range(end - length + 1, end + 1) for end in range(p, min(p + length, window.stop))]
        return max((sum(map(cost, one)) / length - usual) * math.sqrt(length) for one in runs)

    kept: dict[int, float] = {}
    for start in range(0, position + 1, M):
        for p in range(max(0, start - W), max(0, start + M - W)):  # they leave while this mini-batch is read
            window = range(max(0, start - W), start)
            kept[p] = max(surprise(p, length, window) for length in (run, max(1, run // 3)))
        kept = dict(sorted(kept.items(), key=lambda entry: (entry[1], entry[0]))[-count:])
    return sorted(kept)


def seen_by_definition(nll: list[float], n: int, count: int, run: int) -> Tensor:
    """bool [n, n]: which tokens each of the first n sees."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for t in range(n):
        mask[t, max(0, t - W + 1) : t + 1] = True
        for p in kept_by_definition(nll, t // M * M, count, run):
            if p <= t - W:
                mask[t, p] = True
    return mask


@pytest.mark.parametrize(("count", "run"), [(5, 1), (5, 2), (3, 4), (9, 6), (1, 1)])
def test_frozen_it_is_attention_over_what_the_definition_says(
    count: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide(kept_tokens=count, kept_run=run)
    found = read(model, begin(model), rows(1), inner=INNER, learn=False)
    whole = make(3, torch.float64, attention="full")
    whole.load_state_dict(model.state_dict())
    mask = torch.zeros(0, 0, dtype=torch.bool)

    def masked(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
        return scores.softmax(-1) @ value

    monkeypatch.setattr(attention_module, "attention", masked)
    nll: list[float] = [math.nan]
    while len(nll) < T:  # what is kept follows from the losses so far
        n = min(T, len(nll) + M)
        mask = seen_by_definition([*nll, *[0.0] * (n - len(nll))], n, count, run)
        nll = read(whole, begin(whole), rows(1)[:, :n], inner=INNER, learn=False).nll[0].tolist()
    torch.testing.assert_close(found.nll[0], torch.tensor(nll, dtype=torch.float64), equal_nan=True)
    kept = found.state.kept
    assert kept is not None
    assert kept.position[0].tolist() == kept_by_definition(nll, (T - 1) // M * M, count, run)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("changes", [{}, GROUPED])
def test_whoever_keeps_everything_has_full_attention(learn: bool, changes: dict[str, object]) -> None:
    ids = rows(1, 2)
    found = {}
    for name, given in (("kept", {"kept_tokens": T}), ("full", {"kept_tokens": 0, "attention": "full"})):
        model = wide(**given, **changes)
        found[name] = read(model, begin(model, 2), ids, inner=INNER, learn=learn)
    torch.testing.assert_close(found["kept"].nll, found["full"].nll, equal_nan=True)
    torch.testing.assert_close(found["kept"].inner_grad_norm, found["full"].inner_grad_norm)


def test_a_distance_that_reaches_as_far_as_the_text_changes_nothing() -> None:
    found = []
    for distance in (2 * T, T, None):
        model = wide(kept_distance=distance)
        found.append(read(model, begin(model), rows(1), inner=INNER).nll)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)
    assert (found[0] - found[2])[:, W + M :].abs().max() > 1e-4
    assert torch.equal(found[0][:, 1:W], found[2][:, 1:W])


def test_capped_all_kept_tokens_lie_as_far_from_the_mini_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the cap it is attention to keys turned at one position, W before the mini-batch."""
    model = wide(kept_distance=None, num_suffix_blocks=0)
    state = read(model, begin(model), rows(1)[:, :32], inner=INNER, learn=False).state
    block, token = model.blocks[0], rows(1)[:, 32:33]
    _, key, value = block.attention.heads(model.embed(rows(1)[:, :33]), None)
    query, _, _ = block.attention.heads(model.embed(token), model.rotary(32, model.embed(token))["global"])
    found = read(model, state, token, inner=INNER, learn=False).state
    assert found.kept is not None
    position = found.kept.position[0]
    assert (position <= 32 - W).all()
    at = torch.cat((torch.full_like(position, 32 - W), torch.arange(32 - W + 1, 33)))
    turned = torch.cat([model.rotary(int(p), model.embed(token))["global"] for p in at])
    which = torch.cat((position, torch.arange(32 - W + 1, 33)))
    keys = torch.view_as_real(torch.view_as_complex(key[:, :, which].unflatten(-1, (-1, 2)).contiguous()) * turned)
    expected = reference_attention(query, keys.flatten(-2), value[:, :, which], window=None)[:, :, -1:]
    seen = []
    inner = attention_module.attention

    def watched(*args: Tensor, **options: object) -> Tensor:
        seen.append(inner(*args, **options))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(attention_module, "attention", watched)
    read(model, state, token, inner=INNER, learn=False)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("distance", [T, None])
@pytest.mark.parametrize("window", [W, 7, M])
def test_in_pieces_as_at_once(learn: bool, distance: int | None, window: int) -> None:
    model, ids = wide(kept_distance=distance, window_size=window), rows(1, 2)
    whole = in_pieces(model, ids, [T], learn=learn)
    for lengths in ([1] * T, [5, 1, 3, 7, 13, T - 29], [T - 3, 3], [4, 8, 12, T - 24]):
        found = in_pieces(model, ids, lengths, learn=learn)
        torch.testing.assert_close(found.nll, whole.nll, equal_nan=True)
        for x, y in zip(found.state.tensors, whole.state.tensors, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("learn", [False, True])
def test_what_follows_changes_nothing_before(learn: bool) -> None:
    model = wide(kept_distance=None)
    before = read(model, begin(model), rows(1), inner=INNER, learn=learn).nll
    for changed in range(1, T):
        ids = rows(1)
        ids[:, changed:] = (ids[:, changed:] + 1) % 19
        after = read(model, begin(model), ids, inner=INNER, learn=learn).nll
        assert torch.equal(after[:, 1:changed], before[:, 1:changed])
        assert not torch.equal(after[:, changed], before[:, changed])


def test_learning_and_frozen_in_turn_every_token_sees_its_window_and_no_token_twice() -> None:
    """Mini-batches begin anywhere then; what is kept and what is in the window never overlap, nor do they leave out
    what is kept."""
    model = wide(kept_tokens=T, kept_run=1)
    whole = wide(kept_tokens=0, attention="full")
    for learn_first in (True, False):
        state, full, learn = begin(model), begin(whole), learn_first
        for piece in rows(4).split([3, 6, 1, 9, 2, 11, 5, T - 37], 1):
            found, expected = (read(m, s, piece, inner=INNER, learn=learn) for m, s in ((model, state), (whole, full)))
            torch.testing.assert_close(found.nll, expected.nll, equal_nan=True)
            state, full, learn = found.state, expected.state, not learn


def test_none_kept_is_no_part_of_a_state_or_a_file() -> None:
    model = make(3, torch.float64, window_size=W)
    assert begin(model).kept is None
    assert "kept_tokens" not in model.config.as_dict()
    assert not any(name.startswith("kept") for name in model.config.as_dict())


def test_a_state_stays_as_large_once_as_many_are_kept() -> None:
    model = wide()
    sizes = []
    state: ReadingState = begin(model)
    for piece in rows(1, n=20 * M).split(M, 1):
        state = read(model, state, piece, inner=INNER).state
        sizes.append(state.nbytes)
    assert len(set(sizes[8:])) == 1
    plain = dataclasses.replace(model.config, kept_tokens=0)
    without = read(undrawn_like(model, plain), begin(Transformer(plain).double()), rows(1), inner=INNER).state
    assert state.nbytes > without.nbytes


def undrawn_like(model: Transformer, config: object) -> Transformer:
    other = Transformer(config).double()  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())
    return other
