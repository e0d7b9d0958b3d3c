"""A model ready to read: weights, tokenizer and device that belong together, by path or by name.

Models in the box come with Longread and are found by name. In an installed package they lie in `longread/box`, in a
checkout of the repository in `models`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longread.checkpoint import LoadedModel, find_tokenizer, load_model
from longread.config import KEPT_RULE, InnerConfig, UserError
from longread.files import open_tensors
from longread.inner_loop import precompile_reading
from longread.model import Transformer, find_device, undrawn
from longread.session import KIND, Session
from longread.tokenizer import Tokenizer, load_tokenizer

_INSTALLED = Path(__file__).parent / "box"
_CHECKOUT = Path(__file__).parents[2] / "models"


class OpenModel(NamedTuple):
    """A model ready to read, and the tokenizer it was trained with."""

    name: str
    """Its directory's, for tables."""
    model: Transformer
    inner: InnerConfig
    tokenizer: Tokenizer
    fingerprint: str
    provenance: dict[str, Any]
    """The provenance that its config.json states."""
    learns: bool = True
    """Whether its sessions learn where nothing else is said. A model that was only converted does not."""

    def __repr__(self) -> str:
        return f"<OpenModel {self.name}: {self.model.extra_repr()}>"

    def session(self, *, learn: bool | None = None) -> Session:
        """A session that has read nothing yet, and reads texts as well as token ids.

        Args:
            learn: None: as the model was trained to (`learns`).
        """
        learn = self.learns if learn is None else learn
        return Session(self.model, self.inner, learn=learn, fingerprint=self.fingerprint, tokenizer=self.tokenizer)

    def keeping(self, tokens: int, *, run: int | None = None, distance: int | None = None) -> OpenModel:
        """The same weights, which see beside each window so many tokens that have left it (`longread.inner_loop.kept`).

        Nothing is trained for it. Its sessions are those of another model: they hold what is kept. Its fingerprint is
        that of the weights and of what it keeps, the same whatever type they are computed in.

        Args:
            tokens, run, distance: `kept_tokens`, `kept_run` (None: the model's) and `kept_distance` of
                `longread.ModelConfig`.

        Raises:
            UserError: a value is out of range, or the network has more than windowed attention.
        """
        run = self.model.config.kept_run if run is None else run
        config = dataclasses.replace(self.model.config, kept_tokens=tokens, kept_run=run, kept_distance=distance)
        if config == self.model.config:
            return self
        model = undrawn(config)
        model.load_state_dict(self.model.state_dict(), assign=True)
        model.compute_dtype, model.known_tokens = self.model.compute_dtype, self.model.known_tokens
        fingerprint = f"{self.fingerprint.partition('+')[0]}+{tokens}.{run}.{distance}.{KEPT_RULE}"
        return self._replace(model=model.requires_grad_(False), fingerprint=fingerprint)

    def as_saved(self, path: str | Path) -> OpenModel:
        """The same weights, which keep what the session keeps that was saved at `path`.

        Raises:
            UserError: as `restore` does, and as `keeping` does.
        """
        with open_tensors(Path(path), kind=KIND) as (_, metadata):
            kept = metadata.get("kept")
        if kept is None:
            return self
        try:
            return self.keeping(kept["tokens"], run=kept["run"], distance=kept["distance"])
        except (KeyError, TypeError):
            raise UserError(f"{path} is no valid session: it keeps {kept!r:.60}") from None

    def restore(self, path: str | Path) -> Session:
        """The session that was saved at `path`, with the tokens kept that it keeps.

        Raises:
            UserError: the file is damaged, no session, no valid one, or of another model.
        """
        opened = self.as_saved(path)
        return Session.restore(path, opened.model, fingerprint=opened.fingerprint, tokenizer=self.tokenizer)


def boxed_models() -> dict[str, Path]:
    """The models that come with Longread: their directories by name."""
    box = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return {path.parent.name: path.parent for path in sorted(box.glob("*/config.json"))}


def find_model(path_or_name: str | Path) -> Path:
    """The path that was given, where something lies there; else the model in the box of that name.

    Raises:
        UserError: there is neither.
    """
    box = boxed_models()
    if os.path.exists(path_or_name):  # unlike Path.exists, False for what can be no path
        return Path(path_or_name)
    if str(path_or_name) in box:
        return box[str(path_or_name)]
    named = f", or the name of one that comes with Longread: {', '.join(box)}" if box else ""
    raise UserError(f"there is no model at {path_or_name}; give a model, a run or a checkpoint directory{named}")


def open_model(path_or_name: str | Path, device: str = "auto") -> OpenModel:
    """Opens a model directory, a run, a checkpoint or, by its name, a model in the box.

    On a GPU its products run in bfloat16, and its fast weights stay float32. On a CPU a file in half precision runs in
    float32, which is as exact and, where products in half precision are emulated, many times faster.

    Args:
        device: "auto" takes a GPU if there is one; else a device of PyTorch, like "cpu" or "cuda:1".

    Raises:
        UserError: there is no model, no tokenizer, or they do not belong together; or the device cannot be used.
    """
    place, path = find_device(device), find_model(path_or_name)
    if place.type == "cuda":  # no daemon: a process that ends amid an operation of PyTorch's is aborted
        threading.Thread(target=_multiply, args=(place,), name="begin cuBLAS").start()
    loaded = load_model(path, device=place, dtype=torch.bfloat16 if place.type == "cuda" else None)
    if place.type == "cuda":
        precompile_reading(loaded.model, loaded.inner, learn=loaded.learns)
    tokenizer = tokenizer_of(loaded, path)
    if place.type == "cpu" and loaded.model.dtype.itemsize < 4:
        loaded.model.float()
    loaded.model.requires_grad_(False)
    if tokenizer.vocab_size < loaded.model.config.vocab_size:
        loaded.model.known_tokens = tokenizer.vocab_size
    provenance = loaded.metadata.get("provenance", {})
    return OpenModel(
        path.name or str(path), loaded.model, loaded.inner, tokenizer, loaded.fingerprint, provenance, loaded.learns
    )


def _multiply(device: torch.device) -> None:
    """A first product, for which cuBLAS loads what takes a tenth of a second: beside what else there is to open."""
    with contextlib.suppress(RuntimeError):  # what fails here fails where it matters too
        one = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        one @ one


def tokenizer_of(loaded: LoadedModel, path: Path) -> Tokenizer:
    """The tokenizer beside the model that was loaded from `path`. Raises `UserError` if there is none, or another's."""
    if loaded.tokenizer_path is None:
        raise UserError(f"{path} has no tokenizer.json beside it; copy there the one it was trained with")
    tokenizer = load_tokenizer(loaded.tokenizer_path)
    trained_on = loaded.metadata.get("tokenizer_fingerprint")
    if trained_on is not None and not tokenizer.has_fingerprint(trained_on):
        raise UserError(
            f"{loaded.tokenizer_path} is not the tokenizer of {path}; copy there the one it was trained with"
        )
    if tokenizer.vocab_size > loaded.model.config.vocab_size:
        raise UserError(
            f"{loaded.tokenizer_path} has {tokenizer.vocab_size} tokens and {path} knows "
            f"{loaded.model.config.vocab_size}; copy there the one it was trained with"
        )
    return tokenizer


def open_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of a model, without its weights. Raises `UserError` as `open_model` does."""
    found = find_tokenizer(find_model(path_or_name))
    return load_tokenizer(found) if found else open_model(path_or_name, "cpu").tokenizer
