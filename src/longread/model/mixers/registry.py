"""The mixers beside attention by the names that configs give them. `register_mixer` is the one place to add another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn

from longread.config import REGISTERED_MIXERS, Mixer, MixerPlan, ModelConfig, UserError
from longread.model.layers import NoNorm
from longread.model.mixers.gated_deltanet import GatedDeltaNet
from longread.model.mixers.mamba2 import Mamba2
from longread.model.mixers.recurrent import RecurrentMixer
from longread.model.mixers.ttt_kvb import KeyValueBinding

RECURRENT: dict[str, Callable[[ModelConfig, nn.Module, nn.Module], RecurrentMixer]] = {
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "ttt_kvb": KeyValueBinding,
}


def register_mixer(name: str, mixer: type[Any], *, kept_numbers: tuple[int, int] = (25, 25)) -> None:
    """Lets `ModelConfig(mixer=name)` mean `mixer`, in alternation with windowed attention, block 0 first.

    It is made as `mixer(config, pre_norm, post_norm)`, called like `Attention` and kept as `blocks.<i>.<name>`; its
    state, a NamedTuple of tensors [B, ...], has a constant size. Register it before a model, a run or a session that
    names it is opened.

    Args:
        kept_numbers: numbers a token that it keeps for the gradient, as multiples of D, in the type of the products and
            in float32, for estimates of memory.

    Raises:
        UserError: the name is taken or no Python name, or `mixer` is no `RecurrentMixer`.
    """
    if RECURRENT.get(name) is mixer:
        return
    if name in (*get_args(Mixer), *RECURRENT) or not name.isidentifier() or name in _TAKEN or hasattr(nn.Module, name):
        raise UserError(f"{name!r} cannot name a mixer; give a Python name that nothing in a block has yet")
    if not issubclass(mixer, RecurrentMixer):
        raise UserError(f"{mixer.__name__} is no mixer; derive it from longread.model.RecurrentMixer")

    def count(config: ModelConfig) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in mixer(config, NoNorm(), NoNorm()).parameters())

    RECURRENT[name] = mixer
    REGISTERED_MIXERS[name] = MixerPlan(count, kept_numbers)


_TAKEN = ("attention", "fast_mlp", "static_mlp", "mixers", "below", "above", "rope", "learns")
