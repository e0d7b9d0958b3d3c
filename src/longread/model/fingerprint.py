"""What a session is bound to: the exact network and every byte of its parameters."""

from __future__ import annotations

import dataclasses

from longread.files import digest
from longread.model.transformer import Transformer


def fingerprint_of(model: Transformer) -> str:
    """SHA-256, in hex, over the model's config and every byte of its parameters."""
    return digest(dataclasses.asdict(model.config), model.state_dict())
