"""The model as lm-evaluation-harness calls it; the one file that imports it."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from longread.checkpoint import find_tokenizer
from longread.config import UserError
from longread.extras import install_command
from longread.lm_eval.chat import find_template, rendered
from longread.lm_eval.prompts import Prompts
from longread.lm_eval.scoring import BatchReader, score
from longread.lm_eval.writing import GenerationSettings, write
from longread.loading import OpenModel, find_model, open_model
from longread.model import find_device

_LOGGER = logging.getLogger(__name__)
NAME = "longread"
"""Of the model, in the harness."""
HARNESS_DEVICE = "cuda:0"
"""The device that its command line asks for where nobody has named a device."""
AUTO_BATCH_SIZE = 8
MAX_GEN_TOKS = 256
"""Tokens of an answer whose task does not say how many."""
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_Result = TypeVar("_Result")


@functools.cache
def harness_class() -> type:
    """The class of the harness's model "longread", registered there. Raises `UserError` without the harness."""
    try:
        import lm_eval.models  # noqa: F401 — the harness lists its own models only where none is registered
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from tqdm import tqdm
    except ImportError as error:
        reason = f"lm-evaluation-harness cannot be imported ({error})"
        raise UserError(f"{reason}; run {install_command('lm-eval')}") from None

    @register_model(NAME)
    class LongreadLM(TemplateLM):
        """A model of this library as the harness asks it; `longread.lm_eval` says what is scored.

        Args:
            pretrained: a model directory, a run, a checkpoint, or the name of a model in the box.
            learn: whether it learns from each request; None: as sessions of this model do by themselves.
            device: "auto" takes a GPU if there is one; else a device of PyTorch. The harness's own default, cuda:0, is
                "auto" where there is no such GPU.
            batch_size: requests of equal length that are read side by side; "auto": 8.
            max_batch_size: the most that "auto" may take.
            dtype: of the products, float32, float64 or bfloat16; None: as `longread.open_model` chooses.
            max_gen_toks: tokens of an answer whose task does not say how many.
            prefix_token_id: read before a text that has no context; None: what the tokenizer puts before every text.

        Raises:
            UserError: there is no such model, or an argument is not known or out of range.
        """

        __module__ = __package__
        __qualname__ = "LongreadLM"

        def __init__(
            self,
            pretrained: str,
            *,
            learn: bool | str | None = None,
            device: str | None = None,
            batch_size: int | str | None = 1,
            max_batch_size: int | str | None = None,
            dtype: str | None = None,
            max_gen_toks: int | str = MAX_GEN_TOKS,
            prefix_token_id: int | str | None = None,
            **unknown: Any,
        ) -> None:
            super().__init__()
            if unknown:
                known = "pretrained, learn, device, batch_size, max_batch_size, dtype, max_gen_toks, prefix_token_id"
                raise UserError(f"the model {NAME} has no argument {next(iter(unknown))!r}; it has {known}")
            if device is None or (device == HARNESS_DEVICE and not torch.cuda.is_available()):
                device = "auto"
            opened, found = _opened(str(pretrained), device, dtype), find_tokenizer(find_model(pretrained))
            wanted = _yes_or_no("learn", learn)
            session = opened.session() if wanted is None else opened.session(learn=wanted)
            if wanted is None and not session.learn:
                _LOGGER.warning("%s is read frozen, as it says itself; learn=true learns", pretrained)
            self._opened, self._directory = opened, (found or Path(pretrained)).parent
            self._device = opened.model.device
            self.learn = session.learn
            self.batch_size = _batch_size(batch_size, max_batch_size)
            self.max_gen_toks = _whole_number("max_gen_toks", max_gen_toks, least=0)
            prefix = None if prefix_token_id is None else _whole_number("prefix_token_id", prefix_token_id, least=0)
            self._prompts = Prompts(opened.tokenizer, self._directory, opened.model.config.vocab_size, prefix)
            self._reader = BatchReader(opened.model, opened.inner, self.learn)
            self._template: str | None = None

        @property
        def eot_token_id(self) -> int | None:
            """The token that ends a text: EOS, else BOS, which begins the next; None where there is neither."""
            return self._opened.tokenizer.bos_id if self._prompts.eos_id is None else self._prompts.eos_id

        @property
        def prefix_token_id(self) -> int | None:
            """The token before a text that has no context."""
            return next(iter(self._prompts.before_all), None)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """Token ids, the beginning of a text included unless `add_special_tokens` is False."""
            return self._opened.tokenizer.encode(string) if add_special_tokens is False else self._prompts.whole(string)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """log p of each continuation after its context, and whether greedy decoding would write it."""
            encoded = [(request.args, *self._prompts.pair(*request.args)) for request in requests]
            return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            if any(continuation and not context for _, context, continuation in requests):
                self._first_tokens_free()
            pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
            scores = score(self._reader, pairs, self.batch_size)
            found = ((index, (one.log_likelihood, one.is_greedy)) for index, one in scores)  # plain, for the cache
            return self._collected("loglikelihood", [given for given, _, _ in requests], found, disable_tqdm)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """log p of whole documents, each read as one text from its beginning to its end."""
            if not self._prompts.before_all:
                self._first_tokens_free()
            found = ((index, self._document(*request.args)) for index, request in enumerate(requests))
            return self._collected("loglikelihood_rolling", [r.args for r in requests], found, disable_tqdm)

        def _document(self, text: str) -> float:
            session, tokenizer = self._opened.session(learn=self.learn), self._opened.tokenizer
            if self._prompts.before_all == tokenizer.beginning:
                losses = session.read(text)  # as `longread read`
                losses = losses if tokenizer.beginning else losses[1:]
            else:
                losses = session.read(self._prompts.document(text))[1:]
            return -losses.double().sum().item() + 0.0  # no -0.0

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """The answers to all prompts, each up to where its task says."""
            asked = []
            for context, settings in (request.args for request in requests):
                prompt = tuple(self._prompts.prompt(context))
                if not prompt:
                    raise UserError(
                        "a prompt is empty, and the tokenizer puts nothing before a text; give prefix_token_id"
                    )
                asked.append((prompt, GenerationSettings.of(settings, max_tokens=self.max_gen_toks)))
            found = write(self._reader, self._prompts, asked, self.batch_size, torch.initial_seed())
            return self._collected("generate_until", [r.args for r in requests], found, disable_tqdm)

        def _collected(
            self, kind: str, given: Sequence[Any], found: Iterator[tuple[int, _Result]], disable_tqdm: bool
        ) -> list[_Result]:
            """Results in the order of their requests, which go into the harness's cache as they come."""
            results: dict[int, _Result] = {}
            for index, result in tqdm(found, total=len(given), disable=disable_tqdm, desc=f"{NAME}: {kind}"):
                results[index] = result
                self.cache_hook.add_partial(kind, given[index], result)
            return [results[index] for index in range(len(given))]

        def _first_tokens_free(self) -> None:
            _LOGGER.warning(
                "the tokenizer puts nothing before a text, so the first token of one without a context counts 0; "
                "prefix_token_id=ID reads a token before it"
            )

        @property
        def tokenizer_name(self) -> str:
            """The mark that tells requests of one model and template from others, where the harness keeps them."""
            self._prompts.chat = True
            return f"{NAME}-{self._opened.name}-{self._opened.tokenizer.fingerprint[:16]}"

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            """The model's template, or the one of that name; None where none is asked for."""
            if not chat_template:
                return None
            self._template = find_template(self._directory, None if chat_template is True else chat_template)
            self._prompts.chat = True
            return self._template

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """A chat as the model's template writes it. From now on contexts are chats."""
            template = self._template or self.chat_template(True) or ""
            return rendered(template, chat_history, self._directory, add_generation_prompt=add_generation_prompt)

        def get_model_info(self) -> dict[str, Any]:
            """Facts for the harness's results."""
            return {
                "model_num_parameters": self._opened.model.config.num_parameters,
                "model_dtype": str(self._opened.model.dtype),
                "model_sha": self._opened.fingerprint,
                "learn": self.learn,
            }

    return LongreadLM


def main() -> int:
    """Runs the harness's own command line, with "longread" among its models; 2 for wrong input."""
    try:
        harness_class()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        sys.stderr.write(f"longread.lm_eval: error: {error}\n")
        return 2
    return 0


def _opened(pretrained: str, device: str, dtype: str | None) -> OpenModel:
    if dtype in (None, "auto"):
        return open_model(pretrained, device)
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be {', '.join(_DTYPES)} or auto")
    opened = open_model(pretrained, "cpu")  # as exact as its file
    opened.model.to(device=find_device(device), dtype=_DTYPES[dtype])
    return opened


def _yes_or_no(name: str, value: bool | str | None) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise UserError(f"{name} is {value!r}; it must be true or false")
    return str(value).lower() == "true"


def _whole_number(name: str, value: int | str, *, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise UserError(f"{name} is {value!r}; it must be a number, {least} at least")
    return number


def _batch_size(batch_size: int | str | None, most: int | str | None) -> int:
    if str(batch_size).startswith("auto"):
        return min(AUTO_BATCH_SIZE, AUTO_BATCH_SIZE if most is None else _whole_number("max_batch_size", most, least=1))
    return 1 if batch_size is None else _whole_number("batch_size", batch_size, least=1)
