"""Language models that keep learning while they read: end-to-end test-time training (arXiv 2512.23675) in PyTorch.

The names below are the public Python API. Each is loaded from its module on first use, so `import longread`
costs nothing and `longread --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longread.checkpoint import load_model as load_model, save_model as save_model
    from longread.config import (
        InnerConfig as InnerConfig,
        ModelConfig as ModelConfig,
        OptimizerConfig as OptimizerConfig,
        RunConfig as RunConfig,
        UserError as UserError,
    )
    from longread.data import Sampler as Sampler, TokenDataset as TokenDataset, prepare as prepare
    from longread.engine import Engine as Engine, Limits as Limits
    from longread.inner_loop import (
        ReadingState as ReadingState,
        begin as begin,
        next_token_logits as next_token_logits,
        read as read,
        register_inner_optimizer as register_inner_optimizer,
    )
    from longread.loading import OpenModel as OpenModel, open_model as open_model
    from longread.model import (
        RecurrentMixer as RecurrentMixer,
        Transformer as Transformer,
        initialize as initialize,
        register_mixer as register_mixer,
    )
    from longread.outer_loop import end_to_end_loss as end_to_end_loss, static_loss as static_loss
    from longread.recipes import RECIPES as RECIPES, recipe as recipe
    from longread.session import Sampling as Sampling, Session as Session
    from longread.speculative import Speculation as Speculation
    from longread.tokenizer import ByteTokenizer as ByteTokenizer, load_tokenizer as load_tokenizer

__version__ = "0.1.0"

_MODULES = {
    "checkpoint": ("load_model", "save_model"),
    "config": ("InnerConfig", "ModelConfig", "OptimizerConfig", "RunConfig", "UserError"),
    "data": ("Sampler", "TokenDataset", "prepare"),
    "engine": ("Engine", "Limits"),
    "inner_loop": ("ReadingState", "begin", "next_token_logits", "read", "register_inner_optimizer"),
    "loading": ("OpenModel", "open_model"),
    "model": ("RecurrentMixer", "Transformer", "initialize", "register_mixer"),
    "outer_loop": ("end_to_end_loss", "static_loss"),
    "recipes": ("RECIPES", "recipe"),
    "session": ("Sampling", "Session"),
    "speculative": ("Speculation",),
    "tokenizer": ("ByteTokenizer", "load_tokenizer"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'longread' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"longread.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
