"""The network, and nothing about how it is trained."""

from longread.model.mixers.attention import Past
from longread.model.transformer import FastWeights, Transformer, initialize

__all__ = ["FastWeights", "Past", "Transformer", "initialize"]
