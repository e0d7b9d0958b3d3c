"""The sampler: a pure function of (seed, step, rank) that visits every window once an epoch and masks what it must."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from longread.config import UserError
from longread.data import Batch, Documents, Sampler, TokenDataset
from longread.data.shards import ShardWriter

BOS = 60_000
FOLDER = tempfile.TemporaryDirectory()


@cache
def dataset(lengths: tuple[int, ...], documents: Documents, bos_id: int | None = BOS) -> TokenDataset:
    """Documents of BOS and then consecutive ids that occur once in the whole dataset; `lengths` count the BOS."""
    directory = Path(tempfile.mkdtemp(dir=FOLDER.name))
    writer = ShardWriter(directory, BOS + 1, shard_tokens=37)
    next_id = 0
    for length in lengths:
        writer.begin_document("x", None)
        tokens = np.arange(next_id, next_id + length)
        next_id += length
        if bos_id is not None:
            tokens[0] = bos_id
        writer.add(tokens, length)
    writer.finish({"bos_id": bos_id, "tokenizer": None, "documents": documents, "skipped": {}})
    return TokenDataset.open(directory)


@st.composite
def samplers(
    draw: st.DrawFn, documents: Documents | None = None, bos_ids: Sequence[int | None] = (BOS, None)
) -> Sampler:
    lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=8).filter(lambda n: max(n) > 1))
    policy: Documents = documents or draw(st.sampled_from(["reset", "join"]))
    bos_id = draw(st.sampled_from(bos_ids))
    context_length = draw(st.integers(1, sum(lengths) - 1))
    return Sampler(
        dataset(tuple(lengths), policy, bos_id), context_length, draw(st.sampled_from([1, 2, 4, 12])), draw(seeds)
    )


seeds = st.integers(0, 2**64)
steps = st.integers(0, 10_000)
quick = settings(max_examples=60, deadline=None)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def epoch_of(sampler: Sampler, epoch: int) -> list[tuple[list[int], list[bool]]]:
    """Every window of one epoch: its T + 1 tokens and its mask."""
    windows = []
    for i in range(epoch * sampler.num_windows, (epoch + 1) * sampler.num_windows):
        batch = sampler.batch(i // sampler.batch_size)
        row = i % sampler.batch_size
        tokens = [*batch.input_ids[row].tolist(), int(batch.target_ids[row, -1])]
        windows.append((tokens, batch.loss_mask[row].tolist()))
    return windows


# --- a pure function ---


@quick
@given(sampler=samplers(), step=steps)
def test_contract_and_determinism(sampler: Sampler, step: int) -> None:
    batch = sampler.batch(step)
    shape = (sampler.batch_size, sampler.context_length)
    assert [(t.shape, t.dtype) for t in batch] == [(shape, torch.int64), (shape, torch.int64), (shape, torch.bool)]
    assert torch.equal(batch.input_ids[:, 1:], batch.target_ids[:, :-1])
    assert all(t.is_contiguous() for t in batch)
    again = Sampler(TokenDataset.open(sampler.dataset.directory), *shape[::-1], sampler.seed)  # as after a restart
    assert equal(again.batch(step), batch)


@quick
@given(sampler=samplers(), step=steps, world_size=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_batch_does_not_depend_on_the_number_of_ranks(sampler: Sampler, step: int, world_size: int) -> None:
    whole = sampler.batch(step)
    if sampler.batch_size % world_size:
        with pytest.raises(UserError, match=f"does not divide among {world_size} ranks"):
            sampler.batch(step, 0, world_size)
        return
    shares = [sampler.batch(step, rank, world_size) for rank in range(world_size)]
    assert equal(Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True))), whole)


def test_seeds_and_epochs_differ_in_order() -> None:
    data = dataset((500,), "join")
    first, other = (Sampler(data, 10, 50, seed).batch(0).input_ids for seed in (0, 1))
    second = Sampler(data, 10, 50, 0).batch(1).input_ids
    assert not torch.equal(first, other)
    assert not torch.equal(first, second)
    assert set(first[:, 0].tolist()) != set(second[:, 0].tolist())  # other phase, other windows


@pytest.mark.parametrize("documents", ["reset", "join"])
def test_every_epoch_and_every_seed_has_an_order_of_its_own(documents: Documents) -> None:
    """Of 24 windows; each order visits all of them, and none is another one turned round."""
    data = dataset((3,) * 24, "reset") if documents == "reset" else dataset((24 * 3 + 1,), "join")
    orders: set[tuple[int, ...]] = set()
    for seed in range(4):
        sampler = Sampler(data, 3, 24, seed)
        assert sampler.num_windows == 24
        for epoch in range(4):
            starts = sampler.batch(epoch).input_ids[:, 1].tolist()
            place = {start: i for i, start in enumerate(sorted(starts))}
            assert len(place) == 24
            order = [place[start] for start in starts]
            orders.add(min(tuple(order[i:] + order[:i]) for i in range(24)))
    assert len(orders) == 16


# --- what an epoch covers ---


@quick
@given(sampler=samplers("join", bos_ids=[None]), epoch=st.integers(0, 50))
def test_join_visits_every_token_as_a_target_at_most_once(sampler: Sampler, epoch: int) -> None:
    data, T = sampler.dataset, sampler.context_length
    windows = [tokens for tokens, _ in epoch_of(sampler, epoch)]
    assert len(windows) == data.num_tokens // T
    for tokens in windows:  # without BOS, token i of the stream is i
        assert tokens == [(tokens[0] + k) % data.num_tokens for k in range(T + 1)]
    targets = {token for tokens in windows for token in tokens[1:]}
    assert len(targets) == len(windows) * T  # disjoint, so fewer than T targets are left out


@quick
@given(sampler=samplers("join"), epoch=st.integers(0, 50))
def test_join_masks_bos_and_the_seam_of_the_ring(sampler: Sampler, epoch: int) -> None:
    first = sampler.dataset.tokens(0, 1)[0]
    for tokens, mask in epoch_of(sampler, epoch):
        assert mask == [token not in (sampler.dataset.bos_id, first) for token in tokens[1:]]


@quick
@given(sampler=samplers("reset"), epoch=st.integers(0, 50))
def test_reset_visits_every_window_of_every_document_once(sampler: Sampler, epoch: int) -> None:
    data, T = sampler.dataset, sampler.context_length
    seen = collections.Counter[int]()
    windows_of = collections.Counter[int]()
    texts = [data.document(i).tolist() for i in range(data.num_documents)]
    for tokens, mask in epoch_of(sampler, epoch):
        real = tokens[: 1 + sum(mask)]
        document = next(i for i, text in enumerate(texts) if real[-1] in text)
        start = texts[document].index(real[0])
        assert texts[document][start : start + len(real)] == real  # inside one document
        assert mask == [k < len(real) - 1 for k in range(T)]
        assert set(tokens[len(real) :]) <= {data.bos_id or 0}
        assert len(real) == min(T + 1, len(texts[document]))  # padded only where the document is too short
        assert epoch % 2 or (start % T == 0)  # even epochs start where the document does
        windows_of[document] += 1
        seen.update(real[1:])
    expected = {i: max(1, (len(text) - 1) // T) for i, text in enumerate(texts) if len(text) > 1}
    assert windows_of == expected
    assert max(seen.values()) == 1


def test_odd_epochs_of_reset_reach_what_even_ones_leave_over() -> None:
    sampler = Sampler(dataset((30,), "reset"), 20, 1, seed=3)
    targets = {token for epoch in range(60) for tokens, _ in epoch_of(sampler, epoch) for token in tokens[1:]}
    assert targets == set(range(1, 30))


def test_a_fraction_of_an_epoch_is_spread_over_all_documents() -> None:
    sampler = Sampler(dataset((400,) * 10, "reset"), 10, 39, seed=0)
    tenths = collections.Counter((sampler.batch(0).target_ids[:, 0] // 400).tolist())
    assert len(tenths) >= 8


def test_documents_of_one_token_have_no_window() -> None:
    sampler = Sampler(dataset((1, 9, 1, 1, 4, 1), "reset"), 3, 1, seed=0)
    assert sampler.num_windows == 3
    assert all(any(mask) for _, mask in epoch_of(sampler, 0))


# --- bad input ---


def test_too_few_tokens_for_a_window_that_is_not_padded() -> None:
    assert Sampler(dataset((10,), "join"), 9, 1, 0).num_windows == 1
    with pytest.raises(UserError, match="has 10 tokens; a window of context_length 10 needs 11: prepare more text"):
        Sampler(dataset((10,), "join"), 10, 1, 0)


def test_fewer_tokens_than_a_context_are_padded_windows() -> None:
    sampler = Sampler(dataset((3, 1, 4), "reset"), 16, 2, 0)
    assert sampler.num_windows == 2
    tokens, _, mask = sampler.batch(0)
    assert sorted(mask.sum(1).tolist()) == [2, 3]
    assert (tokens[~mask] == (sampler.dataset.bos_id or 0)).sum() >= 2 * 16 - 5 - 2


def test_only_documents_of_one_token() -> None:
    with pytest.raises(UserError, match="is shorter than 2 tokens"):
        Sampler(dataset((1, 1, 1), "reset"), 1, 1, 0)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((0, 1, 0), "context_length is 0; it must be at least 1"),
        ((-8, 1, 0), "context_length is -8; it must be at least 1"),
        ((4, 0, 0), "batch_size is 0; it must be at least 1"),
        ((4, 1, -1), "seed is -1; it must be at least 0"),
    ],
)
def test_bad_sizes(sizes: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Sampler(dataset((10,), "join"), *sizes)


@pytest.mark.parametrize("place", [(-1, 0, 1), (0, -1, 1), (0, 1, 1), (0, 0, 0)])
def test_bad_places(place: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="count from 0"):
        Sampler(dataset((10,), "join"), 4, 1, 0).batch(*place)


@pytest.mark.parametrize(
    ("documents", "targets"),
    [
        ("join", [[42, 17, 22, 6], [32, 1, BOS, BOS], [27, 45, 34, 19]]),
        ("reset", [[38, 6, 13, 18], [23, 28, 1, 2], [22, 27, 32, 17]]),
    ],
)
def test_a_seed_means_the_same_batches_in_every_version(documents: Documents, targets: list[list[int]]) -> None:
    """A run that a later version goes on with must not see a text twice."""
    sampler = Sampler(dataset((12, 25, 9), documents), 5, 4, seed=3)
    assert [sampler.batch(step).target_ids[:, 0].tolist() for step in range(3)] == targets


def test_batches_move_between_devices() -> None:
    batch = Sampler(dataset((10,), "join"), 4, 2, 0).batch(0).to("meta")
    assert isinstance(batch, Batch)
    assert all(tensor.device.type == "meta" for tensor in batch)
