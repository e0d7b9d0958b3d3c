"""The pseudo-random permutation: a permutation of every size, well mixed, and the same in every version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from longread.data.permutation import mix, permute

GOLDEN = 0x9E3779B97F4A7C15
seeds = st.integers(0, 2**64)


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        ((0,), 0xE220A8397B1DCDAF),
        ((GOLDEN,), 0x6E789E6AA1B965F4),
        ((2 * GOLDEN,), 0x06C45D188009454F),
        ((1234567,), 6457827717110365317),
        ((1234567 + GOLDEN,), 3203168211198807973),
        ((2**64 - 1,), 16490336266968443936),
        ((), 0),
        ((3, 5), 6314841413777441128),
    ],
)
def test_mix_is_splitmix64(values: tuple[int, ...], bits: int) -> None:
    """The published outputs of the generator for seeds 0 and 1234567."""
    assert mix(*values) == bits


@pytest.mark.parametrize(
    ("size", "key", "order"),
    [
        (1, 0, [0]),
        (2, 1, [1, 0]),
        (4, 0, [0, 3, 1, 2]),
        (5, 0, [2, 0, 4, 1, 3]),
        (10, 7, [0, 7, 4, 1, 9, 2, 3, 6, 5, 8]),
        (16, 0, [10, 0, 15, 8, 3, 9, 2, 5, 1, 11, 14, 7, 6, 12, 13, 4]),
        (17, 3, [7, 1, 9, 0, 4, 15, 13, 14, 3, 10, 11, 5, 16, 12, 8, 2, 6]),
    ],
)
def test_a_key_means_the_same_order_in_every_version(size: int, key: int, order: list[int]) -> None:
    """A run that a later version goes on with must not see a text twice. Around the powers of four too."""
    assert [permute(i, size, key) for i in range(size)] == order


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 700), key=seeds)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@given(size=st.integers(1, 2**40), key=seeds, data=st.data())
def test_permute_of_huge_sizes_stays_inside(size: int, key: int, data: st.DataObject) -> None:
    assert 0 <= permute(data.draw(st.integers(0, size - 1)), size, key) < size


def test_permute_looks_random() -> None:
    size, keys = 10, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        for i in range(size):
            counts[i, permute(i, size, mix(key))] += 1
    assert np.abs(counts - keys / size).max() < 6 * (keys / size) ** 0.5
