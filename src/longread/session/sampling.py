"""From logits to a token: penalty, temperature, top-k, top-p, the draw."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor

from longread.config import UserError


def check_sampling(
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> None:
    """Raises `UserError` for the first setting that is out of range; comparisons are written so that NaN is."""
    if max_tokens < 0:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must lie above 0 and at most at 1")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1")
    if not 0 < repetition_penalty < float("inf"):
        raise UserError(f"repetition_penalty is {repetition_penalty}; it must be above 0, and 1 changes nothing")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must fit into 64 bits")


def seeded(seed: int | None, device: torch.device) -> torch.Generator:
    """A generator that repeats itself for a seed, and never without one."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:  # of a seed PyTorch's generator on the CPU takes the lowest 32 bits only
        generator.manual_seed(seed if device.type != "cpu" or 0 <= seed < 2**32 else _hashed(seed, bits=32))
    return generator


def derived_seed(seed: int, index: int) -> int:
    """A seed for the `index`-th of several draws that share one: itself for the first, a hash of both for the others.

    A sum would give draw 1 of seed 7 what draw 0 of seed 8 has.
    """
    return _hashed(seed, index, bits=63) if index else seed


def _hashed(*numbers: int, bits: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()) >> (256 - bits)


def penalised(logits: Tensor, recent: Collection[int], penalty: float) -> Tensor:
    """Logits [V], those of recent tokens divided by the penalty, or multiplied where they are negative."""
    ids = torch.tensor(sorted(set(recent)), device=logits.device, dtype=torch.long)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty).nan_to_num())


def draw(logits: Tensor, temperature: float, top_p: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits [V]; temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    p, ids = _sorted(logits, temperature, top_p, top_k)
    return int(ids[torch.multinomial(p, 1, generator=generator)])


def probabilities(logits: Tensor, temperature: float, top_p: float, top_k: int | None) -> Tensor:
    """The distributions that `draw` draws from, [n, V] from logits [n, V], each with the sum 1."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    p, ids = _sorted(logits, temperature, top_p, top_k)
    return torch.zeros_like(logits).scatter_(-1, ids, p / p.sum(-1, keepdim=True))


def _sorted(logits: Tensor, temperature: float, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Weights of the tokens that can be drawn, likeliest first, and their ids: each [..., V], or [..., top_k]."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    values, ids = values[..., :top_k], ids[..., :top_k]
    # differences, and no smaller divisor: a temperature next to 0 then takes the likeliest instead of overflowing
    p = ((values - values[..., :1]) / max(temperature, torch.finfo(values.dtype).tiny)).softmax(-1)
    if top_p < 1:
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)  # the token that crosses the line is kept
    return p, ids
