"""Rotary embedding as config.json files describe it, old and new, in the terms of our config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from longread.config import RopeScaling, UserError

_BASE = 10_000.0


class Rope(NamedTuple):
    """The rotary embeddings of a network."""

    base: float
    scaling: RopeScaling | None
    attention_factor: float
    """On both queries and keys (yarn)."""
    local_base: float | None
    """Of sliding blocks that have one of their own."""


def rope_of(facts: Mapping[str, Any], where: object) -> Rope:
    """Reads `rope_parameters`, for all blocks or by kind of block, or `rope_theta` and `rope_scaling` before there were
    any. Raises `UserError` for what Longread's network lacks."""
    parameters = facts.get("rope_parameters") or {}
    local = facts.get("rope_local_base_freq")
    if "full_attention" in parameters:
        sliding = parameters.get("sliding_attention") or {}
        local = sliding.get("rope_theta", local)
        if sliding.get("rope_type", "default") != "default":
            raise UserError(
                f"{where} scales the rotary embeddings of sliding blocks, which Longread's network does not"
            )
        parameters = parameters["full_attention"] or {}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    base = float(parameters.get("rope_theta", facts.get("rope_theta", _BASE)))
    stretched = (facts.get("rope_scaling") or {}) | parameters
    part = stretched.get("partial_rotary_factor", facts.get("partial_rotary_factor", 1.0))
    if part != 1:
        raise UserError(f"{where} turns {part:g} of each head (partial_rotary_factor), and Longread turns whole heads")
    scaling, factor = _scaling(stretched, facts["max_position_embeddings"], where)
    return Rope(base, scaling, factor, None if local is None else float(local))


def _scaling(stretched: Mapping[str, Any], context: int, where: object) -> tuple[RopeScaling | None, float]:
    """The scaling, and the factor on queries and keys that goes with it."""
    kind = stretched.get("rope_type", stretched.get("type", "default"))
    if kind == "default":
        return None, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"{where} has rotary scaling {kind!r}; Longread has linear, llama3 and yarn")
    original = int(stretched.get("original_max_position_embeddings", context))
    factor = stretched.get("factor")
    factor = context / original if factor is None else float(factor)
    try:
        if kind == "linear":
            return RopeScaling(kind="linear", factor=factor), 1.0
        if kind == "llama3":
            low, high = (float(stretched[f"{end}_freq_factor"]) for end in ("low", "high"))
            made = RopeScaling(
                kind="llama3", factor=factor, original_context=original, low_freq_factor=low, high_freq_factor=high
            )
            return made, 1.0
        made = RopeScaling(
            kind="yarn",
            factor=factor,
            original_context=original,
            beta_fast=float(stretched.get("beta_fast") or 32),
            beta_slow=float(stretched.get("beta_slow") or 1),
            truncate=bool(stretched.get("truncate", True)),
        )
        return made, _yarn_factor(stretched, factor)
    except (KeyError, UserError) as error:
        raise UserError(f"the rotary scaling of {where} cannot be read: {error}") from None


def _yarn_factor(stretched: Mapping[str, Any], factor: float) -> float:
    """By which yarn multiplies queries and keys: 0.1 ln(factor) + 1, if nothing else is said."""
    said = stretched.get("attention_factor")
    if said is not None:
        return float(said)
    one, all_ = stretched.get("mscale"), stretched.get("mscale_all_dim")
    if one and all_:
        return _grown(factor, one) / _grown(factor, all_)
    return _grown(factor, 1.0)


def _grown(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0
