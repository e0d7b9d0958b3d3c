"""What a session is bound to: the exact network and every byte of its parameters."""

from __future__ import annotations

import dataclasses

from longread.files import digest
from longread.model.transformer import Transformer


def fingerprint_of(model: Transformer) -> str:
    """SHA-256, in hex, over the model's config and every byte of its parameters."""
    config = dataclasses.asdict(model.config)
    if model.config.mixer == "attention":  # as it was before there were others: files made then stay valid
        del config["mixer"], config["binding"]
    return digest(config, model.state_dict())
