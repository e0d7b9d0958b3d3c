"""Models of this library in Transformers: `import longread.transformers`, and its Auto classes open them.

    import longread.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("runs/reader/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/reader/model")

A directory of Transformers and one of Longread are the same directory: `save_pretrained` writes what
`longread.load_model` reads. What Transformers calls the cache is a session for each row of a batch.

config.py      config.json as a configuration
model.py       the forward pass
directory.py   the directory of a model
reading.py     rows with padding as sessions read them
cache.py       the sessions of a batch as a cache
generating.py  what generate must know of readers
training.py    the loss of meta-training from labels
callbacks.py   the inner rate in a Trainer
tokenizer.py   the tokenizers of Longread as one of Transformers
versions.py    what has other names in other versions
"""

from __future__ import annotations

import importlib.util

from longread.config import UserError
from longread.extras import install_command

if importlib.util.find_spec("transformers") is None:
    raise UserError(f"Transformers is not installed; run {install_command('hf')}")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longread.transformers.cache import SessionCache
from longread.transformers.callbacks import InnerRateWarmup
from longread.transformers.config import LongreadConfig
from longread.transformers.model import LongreadForCausalLM
from longread.transformers.tokenizer import LongreadTokenizer

__all__ = ["InnerRateWarmup", "LongreadConfig", "LongreadForCausalLM", "LongreadTokenizer", "SessionCache"]

AutoConfig.register(LongreadConfig.model_type, LongreadConfig, exist_ok=True)
AutoModelForCausalLM.register(LongreadConfig, LongreadForCausalLM, exist_ok=True)
AutoTokenizer.register(LongreadConfig, fast_tokenizer_class=LongreadTokenizer, exist_ok=True)
