"""The fingerprint that a session is bound to: the exact network and every byte of its parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from longread.config import KEPT_RULE, ModelConfig
from longread.files import digest
from longread.model.transformer import Transformer


def fingerprint_of(model: Transformer) -> str:
    """SHA-256, in hex, over the model's config and every byte of its parameters."""
    return fingerprint_of_parts(model.config, model.state_dict())


def fingerprint_of_parts(config: ModelConfig, parameters: Mapping[str, Tensor]) -> str:
    """`fingerprint_of` the model that has this config and these parameters."""
    fields = config.as_dict()
    if config.mixer == "attention":  # as it was before there were others: files made then stay valid
        del fields["mixer"], fields["binding"]
    if config.kept_tokens:
        fields["kept_rule"] = KEPT_RULE
    return digest(fields, parameters)
