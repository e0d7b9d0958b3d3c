"""The network, and nothing about how it is trained."""

from longread.model.decoding import decode
from longread.model.device import can_capture, find_device, free_bytes, is_out_of_memory
from longread.model.fingerprint import fingerprint_of
from longread.model.mixers.attention import Attention, LongPast, Past, Ring
from longread.model.mixers.recurrent import RecurrentMixer
from longread.model.mixers.registry import register_mixer
from longread.model.transformer import FastWeights, MixerPast, Rotary, Transformer, initialize
from longread.model.undrawn import undrawn

__all__ = [
    "Attention",
    "FastWeights",
    "LongPast",
    "MixerPast",
    "Past",
    "RecurrentMixer",
    "Ring",
    "Rotary",
    "Transformer",
    "can_capture",
    "decode",
    "find_device",
    "fingerprint_of",
    "free_bytes",
    "initialize",
    "is_out_of_memory",
    "register_mixer",
    "undrawn",
]
