"""Pretrained models become readers, and readers plain models again.

finding             what a SOURCE names: a Transformers directory, a GGUF file, a model in the Hub's cache
families            config.json of each architecture as a network of ours; rope: its rotary embeddings
gguf_config         the metadata of a GGUF as such a config.json
source              where tensors are read from; safetensors_source, gguf_source
weights             the reader's parameters, each made from the source's when it is written
schemes             where the fast MLPs come from
tokenizer           the source's tokenizer as it is meant; gguf_tokenizer
converting          all of it together, and the card
back                a reader as a Transformers directory; back_config: which architecture that is
"""

from __future__ import annotations

from longread.pretrained.back import export_transformers
from longread.pretrained.converting import Converted, Dials, convert_pretrained
from longread.pretrained.finding import find_pretrained, open_pretrained

__all__ = ["Converted", "Dials", "convert_pretrained", "export_transformers", "find_pretrained", "open_pretrained"]
