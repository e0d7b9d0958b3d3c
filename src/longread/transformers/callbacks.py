"""Callbacks of Trainer for a reader, beyond those for any model."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class InnerRateWarmup(TrainerCallback):
    """Warms the rate of the inner steps up as `longread.InnerConfig` says, over the steps of a Trainer."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Sets the rate of a step."""
        reader = getattr(model, "module", model)
        reader.inner_rate = reader.config.inner_config.lr_at(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Leaves the rate as the configuration says."""
        getattr(model, "module", model).inner_rate = None
