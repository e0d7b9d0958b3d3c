"""Floating-point operations of one outer step, forward and backward, by meta-gradient and method: products only.

python -m experiments.flops
"""

from __future__ import annotations

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longread.config import RunConfig
from longread.model import Transformer
from longread.outer_loop import end_to_end_loss, static_loss
from longread.recipes import recipe


def main() -> int:
    rows = [
        ("exact", operations(recipe("small", "e2e"))),
        ("cut every 4 steps", operations(recipe("small", "e2e"), truncate_after=4)),
        ("cut every 2 steps", operations(recipe("small", "e2e"), truncate_after=2)),
        ("first-order", operations(recipe("small", "e2e"), first_order=True)),
        ("static loss of the same network", operations(recipe("small", "naive"))),
        ("static loss of SWA", operations(recipe("small", "swa"))),
    ]
    for name, count in rows:
        print(f"{name:32s} {count / 1e9:7.2f} GFLOP  {count / rows[-1][1]:.2f} x SWA")
    return 0


def operations(config: RunConfig, *, truncate_after: int | None = None, first_order: bool = False) -> int:
    """Of one sequence of the recipe's context; nothing is computed."""
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), counter:
        model = Transformer(config.model)
        tokens = torch.randint(config.model.vocab_size, (1, config.context_length + 1))
        batch = tokens[:, :-1], tokens[:, 1:], torch.ones(1, config.context_length, dtype=torch.bool)
        if config.loss == "static":
            outer = static_loss(model, *batch)
        else:
            outer = end_to_end_loss(
                model,
                *batch,
                inner_lr=1.0,
                inner_clip=1.0,
                meta_gradient="first-order" if first_order else "exact",
                truncate_after=truncate_after,
                recompute="none",
            )
        outer.loss.backward()
    return int(counter.get_total_flops())


if __name__ == "__main__":
    sys.exit(main())
