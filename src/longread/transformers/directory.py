"""The directory of a model: what Transformers saves and opens is what `longread.load_model` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging

from longread.checkpoint import find_tokenizer
from longread.checkpoint.model import CONFIG_FILE, WEIGHTS_FILE, write_model
from longread.config import UserError
from longread.files import atomic_files
from longread.loading import boxed_models
from longread.model import Transformer
from longread.pretrained.tokenizer import special_ids
from longread.tokenizer import ByteTokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


class ModelDirectory(_Model):
    """Opening and saving. Stands before PreTrainedModel among the bases of a model."""

    fingerprint: str | None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **named: Any) -> Any:
        """Opens a model directory of Longread, a run, a model in the box by its name, or one of the Hub.

        Args as of `PreTrainedModel.from_pretrained`, and fields of the configuration, `learn=False` for one.

        Raises:
            UserError: a weight is missing or unknown, or the model would lie on several devices.
        """
        place = _place(pretrained_model_name_or_path)
        with_info = named.pop("output_loading_info", False)
        model, info = super().from_pretrained(place, *arguments, output_loading_info=True, **named)
        for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds, and its config has no place for,")):
            if info[kind]:
                raise UserError(f"{place} {what} {min(info[kind])}; copy the model again")
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise UserError("a reader cannot be spread over several devices; give device_map='cuda', or leave it out")
        model.fingerprint = model.config.fingerprint
        model._end_as_texts_end(Path(place))
        if not (model.config.learn or model.config.learns) and model.config.network.num_suffix_blocks:
            logging.get_logger(__name__).warning(
                f"{place} reads frozen, as its config.json says: it was converted and not adapted, or saved so; give "
                "learn=True to let it learn, or to train it to"
            )
        return (model, info) if with_info else model

    def _end_as_texts_end(self, directory: Path) -> None:
        """Where nothing says how a text ends, it ends as its tokenizer says, or where another would begin: at BOS."""
        found, settings = find_tokenizer(directory) if directory.is_dir() else None, self.generation_config
        if found is None or settings.eos_token_id is not None:
            return
        tokenizer = load_tokenizer(found)
        named = {} if isinstance(tokenizer, ByteTokenizer) else special_ids(found.parent)
        settings.eos_token_id = named.get("eos_token_id", tokenizer.bos_id)
        settings.bos_token_id = tokenizer.bos_id
        settings.pad_token_id = named.get("pad_token_id", settings.eos_token_id)

    def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
        """As of any module."""
        self.fingerprint = None
        return super().load_state_dict(*arguments, **named)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Writes or replaces a model directory, which `longread.load_model` reads as well as `from_pretrained`.

        The weights are one file. The tokenizer is saved by itself, into the same directory. `others` are passed over.

        Raises:
            UserError: it cannot be written, and a model that was there before is still whole; or a weight is missing.
        """
        if push_to_hub:
            raise UserError("save_pretrained only writes files; call push_to_hub of the model to upload it")
        if not is_main_process:
            return
        network, config, directory = self.network, self.config, Path(save_directory)
        if state_dict is not None:
            with torch.device("meta"):
                network = Transformer(config.network)
            try:
                network.load_state_dict(dict(state_dict), assign=True)
            except RuntimeError as error:
                raise UserError(f"the weights are not those of this model: {error}") from None
        config.architectures = [type(self).__name__]
        config.dtype = network.embedding.weight.dtype
        with atomic_files(directory / WEIGHTS_FILE, directory / CONFIG_FILE) as (weights, described):
            write_model(
                weights, described, network, config.inner_config, config.tokenizer_fingerprint, config.provenance
            )
            config.fingerprint = json.loads(described.read_text(encoding="utf-8"))["fingerprint"]
            described.write_text(config.to_json_string(), encoding="utf-8")
        if state_dict is None:
            self.fingerprint = config.fingerprint
        self.generation_config.save_pretrained(directory)


def _place(name: Any) -> Any:
    """Where a model lies: in the directory named, in that of its run, or in the box."""
    if name is None or os.path.exists(name):
        inside = Path(name or ".") / "model"
        return inside if not (Path(name or ".") / CONFIG_FILE).exists() and (inside / CONFIG_FILE).exists() else name
    return boxed_models().get(str(name), name)
