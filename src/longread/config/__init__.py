"""The parts of a run: frozen, typed, validated; no torch in here.

Every class checks its own fields when it is made, so a config that exists is a config that can run. Wrong
values raise `UserError` with the value, the limit and the remedy.

Letters used in the whole library: B sequences, T tokens of context, M tokens of a mini-batch (paper: b),
K window (paper: k), D width, F MLP hidden, N heads, H head dim, V vocabulary, L blocks, S suffix blocks.
"""

from longread.config.checked import TrainingHalted, UserError
from longread.config.model import (
    CONVOLUTION_WIDTH,
    KEPT_RULE,
    REGISTERED_MIXERS,
    AttentionPattern,
    BindingConfig,
    BindingOutput,
    BlockRope,
    Gate,
    Mixer,
    MixerPlan,
    ModelConfig,
)
from longread.config.recompute import SCHEDULES, Recomputation, Recompute, recomputation
from longread.config.rope import RopeScaling
from longread.config.run import (
    INNER_OPTIMIZERS,
    BadBatch,
    InnerConfig,
    Loss,
    MetaGradient,
    OptimizerConfig,
    Parallelism,
    Precision,
    RunConfig,
    Update,
)

__all__ = [
    "CONVOLUTION_WIDTH",
    "INNER_OPTIMIZERS",
    "KEPT_RULE",
    "REGISTERED_MIXERS",
    "SCHEDULES",
    "AttentionPattern",
    "BadBatch",
    "BindingConfig",
    "BindingOutput",
    "BlockRope",
    "Gate",
    "InnerConfig",
    "Loss",
    "MetaGradient",
    "Mixer",
    "MixerPlan",
    "ModelConfig",
    "OptimizerConfig",
    "Parallelism",
    "Precision",
    "Recomputation",
    "Recompute",
    "RopeScaling",
    "RunConfig",
    "TrainingHalted",
    "Update",
    "UserError",
    "recomputation",
]
