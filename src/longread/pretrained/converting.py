"""A pretrained model becomes a reader: a model directory that `longread.load_model` opens.

Weights are streamed: of the source and of the new model only what one parameter needs is in memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from longread.checkpoint import ParameterSpec, save_streamed
from longread.config import InnerConfig, ModelConfig, UserError
from longread.pretrained.card import provenance_of, write_card
from longread.pretrained.finding import Opened
from longread.pretrained.gguf_source import GGUFSource
from longread.pretrained.gguf_tokenizer import write_tokenizer
from longread.pretrained.schemes import Scheme, fast_fields
from longread.pretrained.tokenizer import copy_with_beginning
from longread.pretrained.weights import ReaderWeights
from longread.tokenizer import Tokenizer

WINDOW, MINI_BATCH = 1024, 256
UNADAPTED_RATE = 0.1
"""Of the inner steps of a model that was not trained to learn, should somebody let it.

On SmolLM2-135M (zero-copy, 8 blocks, window 1024) the rate of 1 that models are trained for made books 0.06 nats per
token worse, before any training; 0.1 made two texts of 3K and 4K tokens 0.05 better each.
"""


class Dials(NamedTuple):
    """The choices of a user in a conversion."""

    window: int | None = None
    """None: 1024 tokens, or the source's context if that is shorter."""
    mini_batch: int = MINI_BATCH
    suffix: int | None = None
    """Blocks with a fast MLP; None: a quarter of them."""
    fast_hidden: int | None = None
    """Units of a fast MLP; None: as many as the block's own MLP has."""
    scheme: Scheme = "zero-copy"
    dtype: torch.dtype | None = None
    """Of the matrices; None: the source's, and float32 of quantised ones."""
    tokenizer: Path | None = None
    """Another one than the source's own."""


class Converted(NamedTuple):
    """The result of a conversion."""

    config: ModelConfig
    dtype: torch.dtype
    tokenizer: Tokenizer
    nbytes: int


def convert_pretrained(opened: Opened, directory: Path, dials: Dials = Dials()) -> Converted:  # noqa: B008 (a constant)
    """Writes model, tokenizer and card into `directory`, which exists.

    Raises:
        UserError: a dial is out of range, a weight is missing, superfluous or misshapen, the tokenizer does not fit, or
            the disk refuses.
    """
    config = reader_config(opened, dials)
    weights = ReaderWeights(opened.network, opened.weights, config, dials.scheme, dials.dtype)
    layout = {name: ParameterSpec(stored.shape, stored.dtype) for name, stored in weights.layout.items()}
    nbytes = sum(one.nbytes for one in layout.values())
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise UserError(
            f"the converted model has {_gib(nbytes)} and {directory.parent} has {_gib(free)} free; free some space or "
            "choose another place"
        )
    tokenizer = _tokenizer(opened, directory, dials, config)
    provenance = provenance_of(opened, dials.scheme, dials.fast_hidden)
    save_streamed(
        directory,
        config,
        layout,
        weights,
        InnerConfig(lr=UNADAPTED_RATE),
        tokenizer.fingerprint,
        provenance,
        learns=False,
    )
    write_card(directory, opened, config, dials.scheme, weights.dtype, UNADAPTED_RATE)
    return Converted(config, weights.dtype, tokenizer, nbytes)


def reader_config(opened: Opened, dials: Dials) -> ModelConfig:
    """The network that a source becomes. Raises `UserError` for a dial that it does not allow."""
    network, name = opened.network, opened.found.name
    limits = network.fields["block_windows"] or (0,)
    longest = network.context if 0 in limits else min(network.context, *limits)
    window = min(WINDOW, longest) if dials.window is None else dials.window
    if window > longest:
        seen = f"{longest} tokens of context" if longest == network.context else f"windows of {longest} tokens"
        raise UserError(f"--window {window} is more than {name} was made for, which has {seen}; lower it")
    fast = fast_fields(network, dials.scheme, dials.suffix, dials.fast_hidden)
    return network.config(window_size=window, mini_batch_size=dials.mini_batch, **fast)


def _tokenizer(opened: Opened, directory: Path, dials: Dials, config: ModelConfig) -> Tokenizer:
    if dials.tokenizer is not None:
        tokenizer = copy_with_beginning(dials.tokenizer, directory)
    elif isinstance(opened.weights, GGUFSource):
        tokenizer = write_tokenizer(opened.weights.metadata, directory, opened.weights.where)
    else:
        tokenizer = copy_with_beginning(opened.found.path, directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and {opened.found.name} knows {config.vocab_size}; give "
            "the model's own with --tokenizer"
        )
    return tokenizer


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
