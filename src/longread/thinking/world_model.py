"""The learned world model: one sub-step of a marble, predicted from what is seen; thinking happens in it.

It is trained on transitions of random play alone and sees one sub-step at a time, never a sequence: of elements whose
combination is withheld it has seen each. Its `step` is called as that of the world.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longread.thinking.draws import Draws
from longread.thinking.layers import EnsembleLinear, one_hot
from longread.thinking.tasks import Transitions
from longread.thinking.world import MarbleWorld

_CELLS_STAY = 6.0
"""Added to the logit of what a cell is now: most cells stay what they are."""
_CELL_WEIGHT = 30.0
_BOARDS_AT_ONCE = 2048
"""Of all models together, so that what a step needs of memory does not grow with what is asked."""


class WorldModel(nn.Module):
    """S models, side by side: every cell seen alone, then with three rows and five columns around it, round the edge.

    Shapes: cells [S, ..., P], marble [S, ...].
    """

    def __init__(self, world: MarbleWorld, draws: Draws, width: int) -> None:
        super().__init__()
        self.world, self.width = world, width
        self.see = EnsembleLinear(draws.of("see"), world.kinds + world.columns, width)
        self.near = EnsembleLinear(draws.of("near"), 15 * width, width)
        self.whole = EnsembleLinear(draws.of("whole"), width, width)
        self.cell = EnsembleLinear(draws.of("cell"), width, world.kinds)
        self.tint = EnsembleLinear(draws.of("tint"), width, world.columns)
        self.ends = EnsembleLinear(draws.of("ends"), width, 2)

    def forward(self, cells: Tensor, marble: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of cells [S, n, P, kinds], of the marble [S, n, P · A + 1] (the last: gone) and of success [S, n]."""
        world, now = self.world, one_hot(cells, self.world.kinds)
        tints = one_hot(marble, world.none).unflatten(-1, (world.cells, world.columns))
        seen = torch.relu(self.see(torch.cat([now, tints], -1)))
        rows = F.pad(seen.unflatten(-2, (world.rows, world.columns)), (0, 0, 0, 0, 1, 1))
        turned = [rows.roll(by, -2) for by in (2, 1, 0, -1, -2)]
        around = torch.cat([t[..., r : r + world.rows, :, :] for r in range(3) for t in turned], -1).flatten(-3, -2)
        hidden = torch.relu(self.near(around) + self.whole(seen.amax(-2))[..., None, :])
        gone, success = self.ends(hidden.amax(-2)).unbind(-1)
        place = torch.cat([self.tint(hidden).flatten(-2), gone[..., None]], -1)
        return self.cell(hidden) + _CELLS_STAY * now, place, success

    def loss(self, seen: Transitions) -> Tensor:
        """Mean over n transitions, for each model: [S]."""
        cells, place, success = self(seen.cells, seen.marble)
        of_cells = F.cross_entropy(cells.flatten(0, 2), seen.next_cells.flatten(), reduction="none")
        of_marble = F.cross_entropy(place.flatten(0, 1), seen.next_marble.flatten(), reduction="none")
        of_success = F.binary_cross_entropy_with_logits(success, seen.success.to(success.dtype), reduction="none")
        seeds = len(success)
        return _CELL_WEIGHT * of_cells.view(seeds, -1).mean(1) + of_marble.view(seeds, -1).mean(1) + of_success.mean(1)

    @torch.no_grad()
    def step(self, cells: Tensor, marble: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest next cells, marble and success; as `MarbleWorld.step`, with a leading dimension of models.

        Boards without a marble stay as they are.
        """
        shape, there = marble.shape, marble < self.world.none
        asked = torch.cat([cells, marble[..., None]], -1).reshape(shape[0], -1, cells.shape[-1] + 1)
        place = None
        if len(asked) == 1:  # many marbles come to the same cell of the same board: each case is asked about once
            different, place = asked[0].unique(dim=0, return_inverse=True)
            asked = different[None]
        parts = [self._likeliest(part) for part in asked.split(max(1, _BOARDS_AT_ONCE // shape[0]), 1)]
        found = [torch.cat(part, 1) for part in zip(*parts, strict=True)]
        next_cells, next_marble, success = found if place is None else [part[:, place] for part in found]
        kept = torch.where(there[..., None], next_cells.view(cells.shape), cells)
        return kept, torch.where(there, next_marble.view(shape), self.world.none), success.view(shape) & there

    def _likeliest(self, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        next_cells, next_marble, success = self(asked[..., :-1], asked[..., -1])
        return next_cells.argmax(-1), next_marble.argmax(-1), success > 0


@torch.no_grad()
def damaged(model: WorldModel, noise: float, seed: int = 0) -> None:
    """Adds noise to every weight, in place: of standard deviation `noise` times that of its matrix in its model."""
    draws = Draws.from_seeds([seed], next(model.parameters()).device)
    for name, weight in model.named_parameters():
        if name.endswith("weight"):
            drawn = draws.of(name).uniform(2, *weight.shape)[0]
            gaussian = (-2 * (1 - drawn[0]).log()).sqrt() * (2 * torch.pi * drawn[1]).cos()  # Box and Muller
            spread = weight.std((1, 2), keepdim=True)
            weight.add_(gaussian.to(weight.dtype) * noise * spread)
