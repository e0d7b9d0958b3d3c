"""What of a training step is computed again for want of memory: the values of `recompute` as numbers.

`longread.outer_loop` says what each means.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

from longread.config.checked import UserError

if TYPE_CHECKING:
    from longread.config.model import ModelConfig

Recompute = str
"""`auto`, a name of `SCHEDULES`, N-blocks or N-steps."""

SCHEDULES = ("none", "blocks", "sqrt", "step", "all")
"""Those with a name, in the order of extra work."""

_COUNTED = re.compile(r"([1-9]\d{0,8})-(blocks|steps)")


class Recomputation(NamedTuple):
    """A schedule for one network and one length."""

    blocks: int
    """Of the blocks that run over the whole sequence, the lowest so many keep their input and attention's result."""
    steps: int
    """The first so many inner steps run again, in segments that keep the carry at their start; 0: static loss."""
    attention: bool
    """Those blocks keep their input alone: attention runs again too."""


def recomputation(recompute: Recompute, model: ModelConfig, loss: str, tokens: int) -> Recomputation:
    """The numbers of a schedule, with a `loss` of `RunConfig` and sequences of `tokens`.

    The static loss takes any that has steps for "blocks".

    Raises `UserError` for no such schedule, and for one that counts more than there is.
    """
    counted = _COUNTED.fullmatch(recompute)
    if counted is None and recompute not in SCHEDULES:
        names = ", ".join(("auto", *SCHEDULES))
        raise UserError(f"recompute is {recompute!r}; it must be one of {names}, N-blocks or N-steps")
    static, count = loss == "static", tokens // model.mini_batch_size
    blocks = model.num_blocks if static else model.num_prefix_blocks + 1
    if counted is not None:
        number, unit = int(counted[1]), counted[2]
        most = blocks if unit == "blocks" else count - 1
        if number > most and not (static and unit == "steps"):
            raise UserError(f"recompute is {recompute!r}, but there are only {most} {unit} to compute again")
        if unit == "blocks":
            return Recomputation(number, 0, attention=False)
        return Recomputation(blocks, 0 if static else number, attention=False)
    kept = {"step": 1, "sqrt": math.ceil(math.sqrt(count)), "all": math.ceil(math.sqrt(count))}.get(recompute, count)
    return Recomputation(
        0 if recompute == "none" else blocks, 0 if static else count - kept, attention=recompute == "all" and not static
    )
