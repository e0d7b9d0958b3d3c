"""Answers of a model to prompts: how the next token is chosen, and where the answer ends."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longread.config import UserError
from longread.inner_loop import Decoder
from longread.lm_eval.prompts import Prompts
from longread.lm_eval.scoring import BatchReader, Ids, batches
from longread.session.sampling import Sampling, choose, seeded
from longread.tokenizer import StreamDecoder

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = (*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams")


class GenerationSettings(NamedTuple):
    """How an answer is written."""

    sampling: Sampling
    until: tuple[str, ...]

    @classmethod
    def of(cls, asked: Mapping[str, Any], *, max_tokens: int) -> GenerationSettings:
        """From the harness's `gen_kwargs`. Without `do_sample` a temperature above 0 samples, and none is greedy.

        Args:
            max_tokens: where the request does not say how long an answer may be.

        Raises:
            UserError: a setting is not known here, or out of range.
        """
        unknown = sorted(set(asked) - set(_KNOWN))
        if unknown:
            raise UserError(f"generation knows no {unknown[0]!r}; it knows {', '.join(_KNOWN)}")
        if asked.get("num_beams", 1) != 1:
            raise UserError(f"num_beams is {asked['num_beams']}; a model that learns from what it writes has one: 1")
        until = asked.get("until") or ()
        samples = asked.get("do_sample")
        if samples is None:
            samples = float(asked.get("temperature") or 0) > 0
        temperature = asked.get("temperature")
        sampling = Sampling(
            max_tokens=int(next((asked[name] for name in _LENGTHS if asked.get(name) is not None), max_tokens)),
            temperature=float(1.0 if temperature is None else temperature) if samples else 0.0,
            top_p=float(asked.get("top_p") or 1.0),
            top_k=int(asked["top_k"]) if asked.get("top_k") else None,  # 0 asks for all, as in Transformers
            repetition_penalty=float(asked.get("repetition_penalty") or 1.0),
        )
        return cls(sampling, (until,) if isinstance(until, str) else tuple(until))


def write(
    reader: BatchReader, prompts: Prompts, asked: Sequence[tuple[Ids, GenerationSettings]], batch_size: int, seed: int
) -> Iterator[tuple[int, str]]:
    """The index of each request and its answer, as they become known.

    Args:
        asked: prompts, each of at least one token, and how to go on from them.
        seed: what is drawn depends on it, on the prompt and on how often the same was asked before; on nothing else.
    """
    requests = []
    times = Counter[tuple[Ids, GenerationSettings]]()
    for index, request in enumerate(asked):
        requests.append((request[0], index, _seed(seed, *request, times[request])))
        times[request] += 1
    for settings in dict.fromkeys(settings for _, settings in asked):
        own = [request for request in requests if asked[request[1]][1] == settings]
        own.sort(
            key=lambda request: (-len(request[0]), request[0])
        )  # the longest first: the largest need shows at once
        for first in range(0, len(own), batch_size):
            yield from _side_by_side(reader, prompts, settings, own[first : first + batch_size])


def _side_by_side(
    reader: BatchReader, prompts: Prompts, settings: GenerationSettings, group: Sequence[tuple[Ids, int, int]]
) -> Iterator[tuple[int, str]]:
    """Prompts, the longest first, continued together until the last of them has ended."""
    model = reader.model
    answers = [_GeneratedAnswer(prompts, ids, settings, seed, model.config.window_size) for ids, _, seed in group]
    equal = batches((ids for ids, _, _ in group), len(group), lambda ids: ids)  # in the same order
    states = [state for some in equal for state in reader.after(some)]
    decoder = Decoder(model, states, reader.inner, learn=reader.learn)
    max_tokens = settings.sampling.max_tokens
    for written in range(max_tokens):
        logits = decoder.logits()
        likeliest = logits.argmax(-1).tolist()
        tokens = [
            answer.next(logits[row]) if answer.draws and not answer.ended else likeliest[row]
            for row, answer in enumerate(answers)
        ]
        for row, (answer, token) in enumerate(zip(answers, tokens, strict=True)):
            going = not answer.ended
            answer.take(token)
            if going and answer.ended:
                decoder.leave(row)
        if all(answer.ended for answer in answers) or written + 1 == max_tokens:
            break
        decoder.read(torch.tensor(tokens, device=model.device))
    decoder.rest()
    for (_, index, _), answer in zip(group, answers, strict=True):
        yield index, answer.text()


class _GeneratedAnswer:
    """One answer as it is written."""

    def __init__(self, prompts: Prompts, prompt: Ids, settings: GenerationSettings, seed: int, window: int) -> None:
        texts, self._ends = prompts.stops(settings.until)
        self._sampling, self._window, self._recent = settings.sampling, window, list(prompt[-window:])
        self._decoder = StreamDecoder(prompts.tokenizer, before=self._recent, stops=texts)
        self._generator = seeded(seed, torch.device("cpu"))
        self._text = ""
        self.draws = self._sampling.temperature > 0 or self._sampling.repetition_penalty != 1.0
        """Whether the next token may be another than the likeliest."""
        self.ended = self._sampling.max_tokens == 0

    def next(self, logits: Tensor) -> int:
        """The next token, from logits [V]."""
        return int(choose(logits[None].cpu(), [self._sampling], [self._recent], [self._generator]))

    def take(self, token: int) -> None:
        """Writes one more token, unless the answer has ended or ends before it."""
        self.ended = self.ended or token in self._ends
        if self.ended:
            return
        self._recent = [*self._recent, token][-self._window :]
        self._text += self._decoder.push(token)
        self.ended = self._decoder.stopped

    def text(self) -> str:
        """All of it, up to a stop text."""
        return self._text + self._decoder.close()


def _seed(seed: int, prompt: Ids, settings: GenerationSettings, times: int) -> int:
    facts = repr((seed, prompt, settings, times)).encode()
    return int.from_bytes(hashlib.sha256(facts).digest()[:7])
