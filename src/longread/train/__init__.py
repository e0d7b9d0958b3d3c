"""Training: the outer loop's optimizer, the run, and what happens when it is stopped or goes wrong.

optimizer   AdamW, clipping by global norm, the state of both by parameter name
gradient    the meta-gradient of one batch, accumulated over micro-batches
captured    the same as one CUDA graph
meta_step   the same where parameters are divided among ranks: the outer loss as one `forward`
sharing     what of a run is a rank's: its share of each batch, the rows that it steps
outer_step  one step of all ranks: gradients, votes, the sum, the update; less at a time where memory runs out
seen        what each rank has seen of a step, and what all have seen together
quarantine  batches that are not finite, kept
validation  the loss on held-out text, read learning and read frozen
divergence  whether the steps of a run are still good
stopping    SIGTERM, SIGINT, and the halt at numbers that are not finite or a run that diverges
step_clock  seconds of the parts of a step
throughput  what a step cost: operations, seconds, utilisation
profiling   a trace of some steps
result      how a run ended
run         the run: start or resume, step, record, checkpoint, finish
rank_log    a log for each of several ranks; recording: run.json, the tokenizer, trackers
agreement   what must be as it was when a run goes on
progress    a line or a bar for people
"""

from __future__ import annotations

from longread.train.agreement import begun_config, with_schedules_of
from longread.train.gradient import BatchGradient, accumulate_gradient
from longread.train.optimizer import clip_gradients, make_optimizer, update
from longread.train.profiling import ProfiledSteps
from longread.train.progress import TrainingProgress
from longread.train.result import TrainResult
from longread.train.run import train
from longread.train.validation import validation_losses

__all__ = [
    "BatchGradient",
    "ProfiledSteps",
    "TrainResult",
    "TrainingProgress",
    "accumulate_gradient",
    "begun_config",
    "clip_gradients",
    "make_optimizer",
    "train",
    "update",
    "validation_losses",
    "with_schedules_of",
]
