"""Where the fast MLPs of a converted model come from.

zero-copy   an MLP more in the last blocks: gate, up and norm are those of the block's own MLP, down is 0, so that it
            adds nothing until it has learned; no norm behind it, whose gradient at 0 is hundreds of times too long
in-place    the block's own MLP learns; what stands where the static one was adds nothing: its down is 0 or, with a norm
            behind it, that norm's gain
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from longread.config import UserError
from longread.pretrained.families import Network

Scheme = Literal["zero-copy", "in-place"]


def fast_fields(network: Network, scheme: Scheme, suffix: int | None, fast_hidden: int | None) -> dict[str, Any]:
    """The fields of `ModelConfig` that say what is fast.

    Args:
        suffix: blocks with a fast MLP; None: a quarter of them, rounded, at least one.
        fast_hidden: units of each; None: as many as the block's own MLP has.

    Raises:
        UserError: there are not so many blocks or units, or the scheme cannot do with fewer.
    """
    L, F = network.fields["num_blocks"], network.fields["mlp_hidden"]
    S = max(1, round(L / 4)) if suffix is None else suffix
    if S > L:
        raise UserError(f"--suffix {S} is more than the {L} blocks of the model; lower it")
    if fast_hidden is not None and fast_hidden > F:
        raise UserError(f"--fast-hidden {fast_hidden} is more than the {F} units of the model's MLPs; lower it")
    if scheme == "in-place" and fast_hidden not in (None, F):
        raise UserError(
            f"--fast-hidden {fast_hidden} would split the {F} units of an MLP over two in sequence, which is another "
            "model; leave it out, or take --scheme zero-copy"
        )
    post_norm = False if network.fields["post_norm"] and scheme == "zero-copy" else None
    return {
        "num_suffix_blocks": S,
        "fast_hidden": fast_hidden if fast_hidden != F and S else None,
        "fast_post_norm": post_norm if S else None,
    }


def largest_units(gate: Tensor, up: Tensor, down: Tensor, *, count: int) -> Tensor:
    """The units of an MLP that weigh most, in their order: by ‖gate row‖ · ‖up row‖ · ‖down column‖.

    Args:
        gate, up: [F, D]
        down: [D, F]

    Returns:
        int64 [count]
    """
    weight = gate.float().norm(dim=1) * up.float().norm(dim=1) * down.float().norm(dim=0)
    return torch.topk(weight, count).indices.sort().values
