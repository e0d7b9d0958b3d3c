"""A trained agent with its world model as one file, and the one that comes with Longread."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longread.config import UserError
from longread.files import read_tensors, write_tensors_atomically
from longread.thinking.config import ThinkingConfig
from longread.thinking.draws import Draws
from longread.thinking.episode import Agent, make_agent
from longread.thinking.world import MarbleWorld
from longread.thinking.world_model import WorldModel

KIND = "thinking agent"
FILE = "agent.safetensors"
BOXED = "marble-run"
"""The agent that comes with Longread."""
_INSTALLED = Path(__file__).parents[1] / "box"
_CHECKOUT = Path(__file__).parents[3] / "models"


@dataclass(frozen=True)
class Thinker:
    """One agent, ready to act or to think."""

    config: ThinkingConfig
    world: MarbleWorld
    agent: Agent
    model: WorldModel
    provenance: Mapping[str, Any]
    """The provenance that its file states."""

    @classmethod
    def of(
        cls,
        config: ThinkingConfig,
        tensors: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
        device: str | torch.device,
    ) -> Thinker:
        """From the weights by name, `agent.*` and `model.*`. Raises `UserError` if they are not those of the config."""
        world, draws = MarbleWorld(config.world, device), Draws.from_seeds([config.seed], device)
        model = WorldModel(world, draws.of("world model"), config.world_model.width).to(device)
        agent = make_agent(world, draws, config)
        for part, module in (("agent", agent), ("model", model)):
            for name, weight in module.named_parameters():
                found = tensors.get(f"{part}.{name}")
                if found is None or found.shape != weight.shape:
                    raise UserError(f"there is no {part}.{name} of shape {list(weight.shape)}; train the agent again")
                with torch.no_grad():
                    weight.copy_(found)
            module.requires_grad_(False)
        return cls(config, world, agent, model, provenance)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of agent and world model by name, as `of` takes them."""
        parts = (("agent", self.agent), ("model", self.model))
        return {f"{part}.{name}": w.detach() for part, module in parts for name, w in module.named_parameters()}

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())


def save_thinker(path: str | Path, thinker: Thinker, *, dtype: torch.dtype | None = None) -> None:
    """Writes agent and world model to one file. Raises `UserError` if it cannot be written.

    Args:
        dtype: of the weights in the file; None: their own.
    """
    weights = {name: weight.to(dtype or weight.dtype) for name, weight in thinker.weights.items()}
    metadata = {"config": thinker.config.as_dict(), "provenance": dict(thinker.provenance)}
    write_tensors_atomically(path, weights, metadata, kind=KIND)


def open_thinker(path_or_name: str | Path = BOXED, device: str | torch.device = "cpu") -> Thinker:
    """Opens an agent: its file, the directory of a finished run, or by name the one that comes with Longread.

    Raises:
        UserError: there is none, it is damaged, or it is of another kind.
    """
    tensors, metadata = read_tensors(_file_of(path_or_name), kind=KIND)
    config = ThinkingConfig.from_dict(metadata.get("config", {}))
    return Thinker.of(config, tensors, metadata.get("provenance", {}), device)


def _file_of(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if os.path.isdir(path) and os.path.exists(path / FILE):
        return path / FILE
    if os.path.isfile(path):
        return path
    box = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    if str(path_or_name) == BOXED:
        return box / BOXED / FILE
    said = "its training is not finished" if os.path.isdir(path) else "there is nothing"
    raise UserError(f"no agent at {path_or_name}: {said}; give an agent's file, a finished run, or {BOXED}")
