"""A network with shapes and without numbers, made in no time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from longread.config import ModelConfig
from longread.model.transformer import Transformer

_DRAW = {"normal_", "uniform_", "exponential_", "log_normal_", "random_", "bernoulli_"}


def undrawn(config: ModelConfig) -> Transformer:
    """The network of `config` on the meta device, where parameters take no memory.

    Nothing is drawn. PyTorch would do even that there, with its compiler, which takes seconds to import; it does for
    recurrent mixers, which compute with what they draw.
    """
    with torch.device("meta"), _Undrawn():
        return Transformer(config)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where they would be drawn in place."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or getattr(func, "__name__", None) in _DRAW:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
