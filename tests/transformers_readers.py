"""Readers in Transformers as their tests make them, and what a session of one's own gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longread.session import Session
from longread.transformers import LongreadForCausalLM
from tests.small_model import TEXT

M, K = 8, 16  # of the small model
IDS = list(TEXT.encode())


def session_of(model: LongreadForCausalLM, ids: list[int], *, learn: bool = True) -> Session:
    session = Session(model.network, model.config.inner_config, learn=learn)
    session.read(ids)
    return session


def written(model: LongreadForCausalLM, ids: list[int], count: int, *, learn: bool = True) -> list[int]:
    return list(session_of(model, ids, learn=learn).generate(count, temperature=0))


def one(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """Rows with a token in the place of padding that would change everything if it were read."""
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    left = side == "left"
    ids = [[7] * n * left + row + [7] * n * (not left) for n, row in zip(pads, rows, strict=True)]
    mask = [[0] * n * left + [1] * len(row) + [0] * n * (not left) for n, row in zip(pads, rows, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def greedy(model: LongreadForCausalLM, count: int, **given: Any) -> Any:
    """With every token that was written, and the cache."""
    settings = {"max_new_tokens": count, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    return model.generate(**(settings | {"pad_token_id": 0} | given))


def assert_same(found: Session, expected: Session, tolerance: float = 0.0) -> None:
    assert (found.position, found.steps, found.recent) == (expected.position, expected.steps, expected.recent)
    for a, b in zip(found.state.tensors, expected.state.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
