"""Models as files, the checkpoints of a run, and the layout of the official implementation.

model      a model directory: config.json + model.safetensors
training   the checkpoints of a run, from which training resumes exactly
saving     writes them while training goes on
moments    the optimizer in them, whole or divided among ranks; sharded: through DCP; storage: DCP's files;
           own_rows: which of it is a rank's
load       a model from any of these
streamed   a model directory written parameter by parameter
official   to and from the layout of the official implementation's numbers
orbax      the arrays of an Orbax checkpoint; official_orbax: those of a model that the official code saved
"""

from __future__ import annotations

from longread.checkpoint.load import LoadedModel, ModelDescription, describe_model, find_tokenizer, load_model
from longread.checkpoint.model import fill, save_model
from longread.checkpoint.moments import read_moments
from longread.checkpoint.official import (
    export_official,
    from_official,
    import_official,
    inner_config_from_official,
    model_config_from_official,
    to_official,
)
from longread.checkpoint.orbax import find_orbax_item
from longread.checkpoint.saving import CheckpointWriter
from longread.checkpoint.streamed import ParameterSpec, save_streamed, stream_safetensors
from longread.checkpoint.training import (
    CHECKPOINTS,
    Checkpoint,
    kept,
    newest_checkpoint,
    place_of,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from longread.model import fingerprint_of

__all__ = [
    "CHECKPOINTS",
    "Checkpoint",
    "CheckpointWriter",
    "LoadedModel",
    "ModelDescription",
    "ParameterSpec",
    "describe_model",
    "export_official",
    "fill",
    "find_orbax_item",
    "find_tokenizer",
    "fingerprint_of",
    "from_official",
    "import_official",
    "inner_config_from_official",
    "kept",
    "load_model",
    "model_config_from_official",
    "newest_checkpoint",
    "place_of",
    "read_checkpoint",
    "read_moments",
    "save_model",
    "save_streamed",
    "stream_safetensors",
    "to_official",
    "verify_checkpoint",
    "write_checkpoint",
]
