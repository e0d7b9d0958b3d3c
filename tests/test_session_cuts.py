"""Where a text is cut: what a reading remembers depends on it to the last bit, so it is what it was."""

from __future__ import annotations

from longread.config import ModelConfig
from longread.session.text import next_cut, piece_lengths
from tests.tiny import M, config


def cuts(config: ModelConfig, end: int, device: str = "cpu") -> list[int]:
    found = [0]
    while found[-1] < end:
        found.append(next_cut(found[-1], config, device))
    return found[1:]


def test_pieces_double_from_a_mini_batch_to_the_longest() -> None:
    assert cuts(config(), 4096) == [M, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096]
    assert cuts(config(), 1024) == cuts(config(), 1024, "cuda") == cuts(config(), 1024, "mps")
    assert cuts(config(), 60_000, "cuda")[-3:] == [32_768, 49_152, 65_536]
    assert cuts(config(), 4096, "mps")[-2:] == [3072, 4096]  # a device that nobody knows is cut as a CPU


def test_a_mini_batch_that_does_not_divide_the_longest_piece() -> None:
    assert cuts(config(mini_batch_size=24), 2304)[-4:] == [384, 768, 1536, 2304]
    assert cuts(config(mini_batch_size=1500), 4000) == [1500, 3000, 4500]


def test_a_large_model_reads_shorter_pieces_on_a_cpu() -> None:
    """8e9 parameters times tokens; the vocabulary makes up the parameters here."""
    large = config(vocab_size=1_000_000)
    assert 8e9 / 512 < large.num_parameters < 8e9 / 256
    assert cuts(large, 768) == [4, 8, 16, 32, 64, 128, 256, 512, 768]
    assert cuts(large, 1024, "cuda") == cuts(config(), 1024, "cuda")
    assert cuts(config(vocab_size=1_000_000, mini_batch_size=1000), 2000) == [1000, 2000]


def test_a_reading_that_stopped_is_cut_where_the_undisturbed_one_is() -> None:
    assert next_cut(M - 1, config(), "cpu") == M
    assert next_cut(M, config(), "cpu") == 2 * M
    assert next_cut(1023, config(), "cpu") == 1024
    assert next_cut(1025, config(), "cpu") == 2048
    assert piece_lengths(0, 21, config(), "cpu") == [4, 4, 8, 5]
    assert piece_lengths(5, 16, config(), "cpu") == [3, 8, 5]
    assert piece_lengths(5, 0, config(), "cpu") == [0]  # one piece, of nothing
