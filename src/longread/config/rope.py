"""Rotary embedding stretched beyond the context that a model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longread.config.checked import Checked, UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling(Checked):
    """How the angles per token shrink, as pretrained models name it; `longread.ops.rotary.frequencies` says how much.

    The factor by which "yarn" makes scores larger is not here: it belongs into the weights.
    """

    _path = "model.rope_scaling."

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    """Longest context over the original one."""
    original_context: int | None = None
    """Tokens of context before stretching; llama3 and yarn need it."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: wavelengths above original_context / low are stretched, those below original_context / high are not."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: pairs that turn more than fast times in the original context stay, less than slow times are stretched."""
    truncate: bool = True
    """yarn: the two borders are rounded to whole pairs."""

    def _check(self) -> None:
        self._at_least(1, "factor", "original_context")
        if self.kind != "linear" and self.original_context is None:
            raise UserError(f"{self._path}original_context is missing; {self.kind} needs the context before stretching")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            smaller, larger = getattr(self, low), getattr(self, high)
            if not 0 < smaller < larger:
                raise UserError(f"{self._path}{low} is {smaller}; it must lie between 0 and {high}, {larger}")
