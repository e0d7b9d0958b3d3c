"""Models of this library in EleutherAI's lm-evaluation-harness, as the harness's model "longread".

    python -m longread.lm_eval --model longread --model_args pretrained=DIRECTORY,learn=true --tasks TASK

takes what the command `lm_eval` takes. Versions of the harness that look for models of other packages (entry points of
the group `lm_eval.models`; 0.4.13 does not yet) find this one by themselves, and `lm_eval --model longread` is enough.
From Python, `import longread.lm_eval` registers it, for `lm_eval.simple_evaluate(model="longread", …)`.

What is scored, and by which weights:

- Every request is a text of its own. It begins with the fast weights of the model and, with `learn`, learns from its
  own prompt, mini-batch by mini-batch; nothing that one request taught is left for the next.
- A token is scored by the weights before the step that it takes part in, as everywhere in this library.
- A text begins with what the tokenizer puts there (`Tokenizer.beginning`: BOS, or nothing). Where nothing stands before
  a text, nothing predicts its first token: it is read and not scored, as in `Session.read`. So it counts 0, as if it
  were certain. `prefix_token_id` names a token to stand there instead, where a request has no context.
- Context and continuation are encoded together, and the tokens behind those of the context alone are the continuation;
  spaces at the end of the context count for the continuation. That is the harness's own rule.
- A whole document (`loglikelihood_rolling`) is read as one text, in order. There are no windows.
- What is generated is read like what was given, and learned from.

A context that several requests share is read once. Requests of equal length are read side by side, `batch_size` of
them, and answers are written side by side; each gets what it would get alone, to rounding.

adapter.py   the class that the harness calls, and its command line
prompts.py   the texts of requests as token ids
chat.py      chats as the texts that the model's template makes of them
scoring.py   how likely continuations are
writing.py   what is written, and where it ends
"""

from __future__ import annotations

import importlib.util

from longread.lm_eval.adapter import harness_class, main

__all__ = ["LongreadLM", "main"]

if importlib.util.find_spec("lm_eval") is not None:
    LongreadLM = harness_class()


def __getattr__(name: str) -> type:
    """Only for what is not there: without the harness `longread.lm_eval.LongreadLM` says what installs it."""
    if name != "LongreadLM":
        raise AttributeError(f"module 'longread.lm_eval' has no attribute {name!r}")
    return harness_class()
