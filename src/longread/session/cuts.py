"""Where a text is cut that is read in pieces: at positions which depend on nothing but the model and its device.

A product of few rows is not rounded as the same rows in a product of many. So two readings of one text are the same,
bit for bit, only if both are cut at the same places: a reading that stopped and went on and one that was never
disturbed, one of the command line and one from Python.
"""

from __future__ import annotations

from longread.config import ModelConfig

LONGEST_PIECE = {"cpu": 1024, "cuda": 16_384}
"""Tokens. On a CPU shorter ones cost time, a sixth more at 128; on a GPU long ones are read as CUDA graphs."""
MOST_WORK = 8e9
"""Parameters times tokens of a piece on a CPU, where it is longer than a mini-batch: about a second on two cores."""


def next_cut(position: int, config: ModelConfig, device: str) -> int:
    """Where a piece ends that begins at `position`: M, 2M, 4M, …, then at every multiple of the longest piece."""
    longest, size = LONGEST_PIECE.get(device, LONGEST_PIECE["cpu"]), config.mini_batch_size
    if device == "cpu":
        longest = min(longest, int(MOST_WORK / config.num_parameters))
    while size * 2 <= longest:
        if position < size:
            return size
        size *= 2
    return (position // size + 1) * size


def piece_lengths(position: int, num_tokens: int, config: ModelConfig, device: str) -> list[int]:
    """Tokens of each piece, where so many are read from a position on; of the last, what is left."""
    lengths, end = list[int](), position + num_tokens
    while position < end:
        cut = min(next_cut(position, config, device), end)
        lengths.append(cut - position)
        position = cut
    return lengths or [0]
