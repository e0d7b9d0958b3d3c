"""The description of a converted model: in its config.json for programs, in its README.md for people."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from longread import __version__
from longread.config import ModelConfig
from longread.pretrained.finding import Opened
from longread.pretrained.hub import is_hub_name
from longread.pretrained.schemes import Scheme

CARD = "README.md"
_WAYS = {
    "zero-copy": (
        "In each of them a fast MLP was put before the block's own: gate, up and norm are copies of it, and down is 0, "
        "so nothing is added yet."
    ),
    "in-place": (
        "In each of them the pretrained MLP is the fast one; what stands behind it as the static MLP adds nothing yet."
    ),
}


def provenance_of(opened: Opened, scheme: Scheme, fast_hidden: int | None) -> dict[str, Any]:
    """Where a model comes from, and how; what is not known is left out."""
    facts = {
        "converted_from": opened.found.name,
        "revision": opened.found.revision,
        "architecture": opened.network.family,
        "context": opened.network.context,
        "license": opened.licence,
        "quantisation": opened.quantisation,
        "scheme": scheme,
        "fast_hidden": fast_hidden,
        "longread": __version__,
    }
    return {name: value for name, value in facts.items() if value is not None}


def write_card(
    directory: Path, opened: Opened, config: ModelConfig, scheme: Scheme, dtype: torch.dtype, rate: float
) -> None:
    """Writes the card, and copies licences that lie beside the source."""
    (directory / CARD).write_text(_card(opened, config, scheme, dtype, rate), encoding="utf-8")
    if opened.found.path.is_dir():
        for pattern in ("LICENSE*", "NOTICE*"):
            for path in opened.found.path.glob(pattern):
                shutil.copyfile(path, directory / path.name)


def _card(opened: Opened, config: ModelConfig, scheme: Scheme, dtype: torch.dtype, rate: float) -> str:
    found, network = opened.found, opened.network
    head = ["library_name: longread"]
    if opened.licence:
        head.append(f"license: {json.dumps(opened.licence)}")
    if is_hub_name(found.name):
        head.append(f"base_model: {found.name}")
    revision = f" (revision {found.revision})" if found.revision else ""
    kind = f"a pretrained {network.family} model with {network.context:,} tokens of context"
    size = f"{config.num_parameters:,} parameters, in {str(dtype).removeprefix('torch.')}"
    own = f"`{found.name}`{revision}, {kind}, converted by Longread {__version__}: {size}."
    lines = [f"{own} Attention sees the last {config.window_size:,} tokens at most."]
    if opened.quantisation:
        lines.append(
            f"Its weights were quantised ({opened.quantisation}) and have been dequantised: they are no more exact "
            "than before, and this model equals the quantised one, not the one that was quantised."
        )
    if config.num_suffix_blocks:
        lines += _of_learning(config, scheme, rate)
    licence = "The licence of the weights is that of the source, which does not say."
    if opened.licence:
        licence = f"Licence of the weights: {opened.licence}."
    body = "\n\n".join([*lines, licence])
    return "---\n" + "\n".join(head) + f"\n---\n\n# {_title(found.name)}, a reader\n\n{body}\n"


def _of_learning(config: ModelConfig, scheme: Scheme, rate: float) -> list[str]:
    which = f"The last {config.num_suffix_blocks} of {config.num_blocks} blocks"
    what = f"{config.num_fast_weights:,} numbers for each text, a step every {config.mini_batch_size:,} tokens"
    lines = [f"{which} can learn while they read, {what}. {_WAYS[scheme]}"]
    if config.fast_mlp_hidden < config.mlp_hidden:
        lines.append(
            f"A fast MLP has the {config.fast_mlp_hidden:,} of {config.mlp_hidden:,} units whose rows of gate and up "
            "and column of down have the largest product of norms."
        )
    lines.append(
        "**Not adapted: it reads frozen**, as the pretrained model with this window would. It was not trained to "
        f"learn; what learning does to it depends on the text, and the small rate of {rate:g} in its config is for "
        "whoever asks for it (`--learn`). `longread train` adapts it."
    )
    return lines


def _title(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".gguf")
