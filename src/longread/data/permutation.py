"""A pseudo-random permutation of any size, evaluated at one index at a time in constant memory."""

from __future__ import annotations

_ROUNDS = 6
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """64 well-mixed bits from whole numbers: SplitMix64's finaliser (Steele et al. 2014), chained."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Where the permutation of range(size) that belongs to `key` takes `index`.

    A Feistel network permutes the next power of four; indices that it takes outside walk on along their cycle until
    they are inside again, on average fewer than four times (Black and Rogaway 2002).
    """
    half = ((size - 1).bit_length() + 1) // 2
    if half == 0:
        return index
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(key, number, right) & mask)
        index = left << half | right
        if index < size:
            return index
