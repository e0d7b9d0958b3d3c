"""The description of a finished model: in config.json for programs and, where it began as another, in README.md too."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longread import __version__
from longread.config import RunConfig
from longread.files import atomic_files

CARD = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def provenance_of(config: RunConfig, step: int, tokens: int, initial: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where the model of a run comes from: the run, and what it began with, as run.json says it."""
    facts = {"run": config.name, "step": step, "tokens": tokens, "context_length": config.context_length}
    return facts | ({"adapted_from": _origin_of(initial)} if initial else {})


def _origin_of(initial: Mapping[str, Any]) -> dict[str, Any]:
    """The model that a run began with: its name, its fingerprint, and where it comes from itself."""
    path = Path(initial["path"])
    name = path.parent.name if path.name == "model" else path.name  # of a run
    return {"model": name, **{key: value for key, value in initial.items() if key != "path"}}


def write_card(directory: Path, config: RunConfig, tokens: int, initial: Mapping[str, Any]) -> None:
    """Writes the card of the model in `directory`, and copies licences that lie beside the one it began with."""
    origin = _origin_of(initial)
    with atomic_files(directory / CARD) as (temporary,):
        temporary.write_text(_card(config, tokens, origin), encoding="utf-8")
    for pattern in ("LICENSE*", "NOTICE*"):
        for path in Path(initial["path"]).glob(pattern):
            shutil.copyfile(path, directory / path.name)


def _card(config: RunConfig, tokens: int, origin: Mapping[str, Any]) -> str:
    facts: Mapping[str, Any] = origin.get("provenance", {})
    source = facts.get("converted_from", origin["model"])
    head = ["library_name: longread"]
    if facts.get("license"):
        head.append(f"license: {json.dumps(facts['license'])}")
    if _HUB_NAME.fullmatch(source) and not source.endswith(".gguf"):
        head.append(f"base_model: {source}")
    model, inner = config.model, config.inner
    way = "as it learns while it reads" if config.loss == "end-to-end" else "reading with its weights as they are"
    trained = (
        "" if config.trained_blocks is None else f", the last {config.trained_blocks} blocks and the final norm alone"
    )
    began = f"It began with `{origin['model']}` (fingerprint {origin['fingerprint'][:8]})."
    seen = f"attention {model.attention}, windows of {model.window_size:,} tokens"
    length = f"{config.steps:,} steps, {tokens:,} tokens in sequences of {config.context_length:,}"
    lines = [
        f"`{source}`, trained further by Longread {__version__} {way}: {length}{trained}. {began}",
        f"{model.num_parameters:,} parameters; {seen}; outer rate {config.optimizer.lr:g}, loss {config.loss}.",
    ]
    if model.num_suffix_blocks:
        lines.append(
            f"The last {model.num_suffix_blocks} of {model.num_blocks} blocks learn while they read, "
            f"{model.num_fast_weights:,} numbers for each text, a step of rate {inner.lr:g} every "
            f"{model.mini_batch_size:,} tokens; meta-gradient {config.meta_gradient}."
        )
    if facts.get("quantisation"):
        lines.append(f"The weights that it began with were dequantised ({facts['quantisation']}).")
    if facts.get("license"):
        lines.append(f"Licence of the weights it began with: {facts['license']}.")
    title = source.rpartition("/")[2].removesuffix(".gguf")
    return "---\n" + "\n".join(head) + f"\n---\n\n# {title}, {config.name}\n\n" + "\n\n".join(lines) + "\n"
