"""The config.json of a model directory as a configuration of Transformers."""

from __future__ import annotations

import copy
import json
from typing import Any

from transformers import PretrainedConfig

from longread.config import InnerConfig, ModelConfig, UserError
from longread.files import FORMAT, FORMAT_VERSION
from longread.recipes import recipe

KIND = "model"
_OURS = ("fingerprint", "tokenizer_fingerprint", "model", "inner", "provenance")
_DERIVED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
_UNWRITTEN = {*_OURS, *_DERIVED, "learn", "learns"}


class LongreadConfig(PretrainedConfig):
    """The `config.json` of a model directory: one file for `longread.load_model` and for Transformers.

    Args:
        model: fields of `longread.ModelConfig`; None: those of the recipe "toy".
        inner: fields of `longread.InnerConfig`, the steps that are taken while reading.
        learn: whether the model learns while it reads, where nothing else is said; None: as `learns`.
        learns: False in the file of a model that was not trained to learn.
        training_logits: False gives no logits in training, where labels are given: of long texts they take more
            memory than anything else.
        fingerprint, tokenizer_fingerprint, provenance: as `longread.save_model` writes them.

    Raises:
        UserError: a field is unknown or its value is wrong.
    """

    model_type = "longread"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  # as the base class has it

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        inner: dict[str, Any] | None = None,
        learn: bool | None = None,
        learns: bool = True,
        training_logits: bool = True,
        fingerprint: str | None = None,
        tokenizer_fingerprint: str | None = None,
        provenance: dict[str, Any] | None = None,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        network = recipe("toy").model if model is None else ModelConfig.from_dict(model)
        self.model = network.as_dict()
        self.inner = InnerConfig.from_dict(inner or {}).as_dict()
        self.learn, self.learns = learns if learn is None else learn, learns
        self.training_logits = training_logits
        self.fingerprint, self.tokenizer_fingerprint = fingerprint, tokenizer_fingerprint
        self.provenance = dict(provenance or {})
        self.use_cache = use_cache
        # what others look for in any configuration
        self.vocab_size, self.hidden_size = network.vocab_size, network.width
        self.num_hidden_layers, self.num_attention_heads = network.num_blocks, network.num_heads
        self.num_key_value_heads, self.head_dim = network.num_kv_heads, network.head_dim
        self.intermediate_size = network.mlp_hidden
        ours = {"format", "format_version", "kind", *_DERIVED}
        super().__init__(**{name: value for name, value in others.items() if name not in ours})
        # a tied head is no parameter of its own, so there is nothing to tie
        self.tie_word_embeddings = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **named: Any) -> Any:
        """The configuration that a file holds. Raises `UserError` where it is that of another library."""
        if config_dict and "model" not in config_dict:
            raise UserError("this config.json describes no Longread model; make one of it with `longread convert`")
        return super().from_dict(config_dict, **named)

    @property
    def network(self) -> ModelConfig:
        """The network."""
        return ModelConfig.from_dict(self.model)

    @property
    def inner_config(self) -> InnerConfig:
        """The inner loop."""
        return InnerConfig.from_dict(self.inner)

    def to_dict(self) -> dict[str, Any]:
        """The entries of a config.json that Longread reads, and those of Transformers' own that it passes over."""
        values = {name: value for name, value in super().to_dict().items() if name not in _UNWRITTEN}
        ours: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": KIND}
        ours |= {name: copy.deepcopy(getattr(self, name)) for name in _OURS}
        return ours | values | ({} if self.learn else {"learns": False})

    def to_diff_dict(self) -> dict[str, Any]:
        """The contents of the file: all that is Longread's, and what differs of Transformers' own."""
        return self._without_defaults(self.to_dict())

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of a config.json."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"

    def _without_defaults(self, values: dict[str, Any]) -> dict[str, Any]:
        default = PretrainedConfig().to_dict() | {
            "training_logits": True,
            "use_cache": True,
            "tie_word_embeddings": False,
        }
        kept = ("model_type", "transformers_version")
        return {n: v for n, v in values.items() if n in kept or n not in default or default[n] != v}
