"""Names that differ between versions of Transformers."""

from __future__ import annotations

import dataclasses

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
)
"""The name of the cache among the arguments of a model and in what it gives; it was renamed in 5.24."""
