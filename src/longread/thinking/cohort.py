"""S agents that train side by side, each with a world model of its own: first the models, then the agents.

Every number that is drawn is a function of seed and step, so an agent of a cohort becomes what it becomes alone, up to
rounding. One product serves all agents, which is what makes a GPU fast here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from longread.config import UserError
from longread.thinking.config import ThinkingConfig
from longread.thinking.draws import Draws
from longread.thinking.episode import episode, make_agent, objective
from longread.thinking.selection import make_selector
from longread.thinking.tasks import Transitions, draw_legal, random_play, rule
from longread.thinking.trials import outcomes
from longread.thinking.world import MarbleWorld
from longread.thinking.world_model import WorldModel

Row = dict[str, list[float]]
"""Figures of one step, each a list with an entry for each agent."""
CLIP = 1.0
"""Of the gradient of one agent, over all its weights."""


class Cohort:
    """Everything that training changes, and the steps that change it."""

    def __init__(
        self,
        config: ThinkingConfig,
        *,
        seeds: Sequence[int] | None = None,
        withheld: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Of the agents of `config`, or of others that differ from it in seed and in what is withheld."""
        self.config = config
        self.seeds = list(seeds) if seeds is not None else [config.seed]
        self.withheld = list(withheld) if withheld is not None else [config.withheld] * len(self.seeds)
        if len(self.seeds) != len(self.withheld):
            raise UserError(
                f"there are {len(self.seeds)} seeds and {len(self.withheld)} combinations; give one for each"
            )
        self.world = MarbleWorld(config.world, device)
        self.rule = rule(self.world, self.withheld, pairs=config.pairs)
        self.draws = Draws.from_seeds(self.seeds, device)
        self.model = WorldModel(self.world, self.draws.of("world model"), config.world_model.width).to(device)
        self.agent = make_agent(self.world, self.draws, config)
        self.selector = make_selector(self.world, self.rule, self.draws.of("selector"), config)
        self.optimizers = {name: _adam(module) for name, module in self.modules.items()}
        self.step = 0
        self._seen: tuple[int, Transitions, Tensor] | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "agent": self.agent}

    @property
    def steps(self) -> int:
        """Of both parts of training together."""
        return self.config.world_model.steps + self.config.iterations

    @property
    def learns_the_world(self) -> bool:
        """Whether the next step is one of the world model."""
        return self.step < self.config.world_model.steps

    def advance(self) -> Row:
        """Takes one step, of the models or of the agents."""
        row = self._advance_model() if self.learns_the_world else self._advance_agent()
        self.step += 1
        return row

    def _advance_model(self) -> Row:
        config = self.config.world_model
        seen = self._transitions(self.step // config.renew_every)
        loss = self.model.loss(seen)
        lr = config.lr * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        norm = self._update("model", loss, lr, clip=None)
        return {"loss": loss.tolist(), "grad_norm": norm.tolist(), "lr": [lr] * len(self.seeds)}

    def _transitions(self, round_: int) -> Transitions:
        """Transitions of random play, drawn for this step from those of the boards of this round."""
        config, draws = self.config.world_model, self.draws.of("transitions")
        if self._seen is None or self._seen[0] != round_:
            cells = draw_legal(self.world, draws.of("boards", round_), self.rule, config.boards)
            played = random_play(self.world, draws.of("plans", round_), cells)
            order = (~played.valid).byte().argsort(dim=1, stable=True)
            self._seen = (round_, played, order)
        _, played, order = self._seen
        drawn = draws.of("batch", self.step).uniform(config.batch_size) * played.valid.sum(1, keepdim=True)
        index = order.gather(1, drawn.long())
        rows = torch.arange(len(index), device=index.device)[:, None]
        return Transitions(*(part[rows, index] for part in played))

    def _advance_agent(self) -> Row:
        config, iteration = self.config, self.step - self.config.world_model.steps
        draws = self.draws.of("iteration", iteration)
        cells = self.selector.boards(draws.of("boards"))
        known = outcomes(self.world, self.world.step, cells)  # of the real simulator, in training
        found = episode(self.agent, cells, known, draws.of("episode"), config)
        progress = iteration / config.iterations
        loss = objective(found, config, config.entropy * (1 - 0.9 * progress))
        lr = config.lr * min(1.0, (iteration + 1) / max(1, config.warmup)) * (1 - 0.9 * progress)
        norm = self._update("agent", loss, lr, clip=CLIP)
        before, after = (trial.success.double().mean(-1) for trial in (found.before, found.after))
        self.selector.update(draws.of("selection"), before, after)
        mixed = ((after > 0) & (after < 1)).double()
        figures = {"loss": loss, "pre": before.mean(-1), "post": after.mean(-1), "mixed": mixed.mean(-1)}
        figures |= {"solvable": known.solvable.double().mean(-1), "grad_norm": norm}
        return {name: value.tolist() for name, value in figures.items()} | {"lr": [lr] * len(self.seeds)}

    def _update(self, name: str, loss: Tensor, lr: float, clip: float | None) -> Tensor:
        """One step of Adam on the sum of the losses, which no two agents share; the norms of the gradients, [S]."""
        optimizer, module = self.optimizers[name], self.modules[name]
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        if clip is not None:
            factor = clip / norm.clamp(min=clip)
            for gradient in gradients:
                gradient *= factor.view(-1, *[1] * (gradient.dim() - 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        return norm.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, by name; `restore` takes it back."""
        found = {f"selector.{name}": tensor for name, tensor in self.selector.tensors().items()}
        for part, module in self.modules.items():
            for name, weight in module.named_parameters():
                found[f"{part}.{name}"] = weight.detach()
                for moment, value in self.optimizers[part].state.get(weight, {}).items():
                    found[f"{moment}.{part}.{name}"] = value
        return found

    @torch.no_grad()
    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on after `step` steps with what `tensors` gave then. Raises `UserError` if it is of another cohort."""
        for part, module in self.modules.items():
            for name, weight in module.named_parameters():
                found = tensors.get(f"{part}.{name}")
                if found is None or found.shape != weight.shape:
                    raise UserError(f"the checkpoint has no {part}.{name} of shape {list(weight.shape)}; it is damaged")
                weight.copy_(found)
                moments = ("step", "exp_avg", "exp_avg_sq")
                kept = {m: tensors[f"{m}.{part}.{name}"] for m in moments if f"{m}.{part}.{name}" in tensors}
                if kept:
                    self.optimizers[part].state[weight] = {
                        m: value.clone() if m == "step" else value.to(weight.device) for m, value in kept.items()
                    }
        own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("selector.")}
        self.selector.restore(own)
        self.step = step


def _adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters())
