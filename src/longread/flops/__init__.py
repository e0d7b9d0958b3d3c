"""The least that a measurement takes: floating-point operations and bytes, counted from a config alone.

network.py    one forward of a token, part by part; reading; the bytes of writing
training.py   one step of training by its parts: inner steps, the outer step, what is computed again

A multiplication with its addition counts 2. Products are counted once: what an implementation computes again for its
own sake, and everything that is no product, is its own loss.
"""

from longread.flops.network import decoding_bytes, head_flops, lower_flops, mlp_flops, reading_flops, visible_keys
from longread.flops.training import TrainingFlops, recomputed_flops, sequence_flops, step_flops, training_flops

__all__ = [
    "TrainingFlops",
    "decoding_bytes",
    "head_flops",
    "lower_flops",
    "mlp_flops",
    "reading_flops",
    "recomputed_flops",
    "sequence_flops",
    "step_flops",
    "training_flops",
    "visible_keys",
]
