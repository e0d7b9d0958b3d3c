"""One reader: it reads, learns, continues a text, forks, and is kept in a file.

A session is a model, the state of what it has read (`longread.inner_loop.reading`), and the newest tokens, which
the repetition penalty looks at. Its size does not depend on how much it has read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longread.config import InnerConfig, UserError
from longread.files import read_tensors, write_tensors_atomically
from longread.inner_loop import Decoder, ReadingState, begin, read
from longread.inner_loop.step import from_matrices, matrices
from longread.model import MixerPast, Transformer, fingerprint_of

KIND = "session"


class Session:
    """A text being read by a model that learns from it.

    Args:
        model: its parameters are shared between sessions and never changed.
        inner: rate and clip of the steps.
        learn: False reads with the weights as they are.
        fingerprint: of the model, where it is already known; it is computed otherwise, when the session is saved.
    """

    def __init__(
        self, model: Transformer, inner: InnerConfig, *, learn: bool = True, fingerprint: str | None = None
    ) -> None:
        self.model, self.inner = model, inner
        self._learn = learn
        self._fingerprint = fingerprint
        self._at_rest: ReadingState | None = begin(model)  # None while a decoder has it
        self._decoder: Decoder | None = None
        self._recent: list[int] = []
        self.inner_grad_norms = torch.empty(0)
        """Norms, before clipping, of the gradients of the steps that the newest call of `read` took, [steps]."""

    @property
    def learn(self) -> bool:
        """Whether it learns from what it reads, and from what it writes; can be changed at any time."""
        return self._learn

    @learn.setter
    def learn(self, learn: bool) -> None:
        self._at_rest, self._decoder, self._learn = self._state, None, learn

    @property
    def position(self) -> int:
        """Tokens read."""
        return self._decoder.position if self._decoder is not None else self._state.position

    @property
    def nbytes(self) -> int:
        """Bytes of everything the session remembers."""
        return self._state.nbytes

    @property
    def state(self) -> ReadingState:
        """What is left of the text; a value that later reading does not change."""
        return self._state

    @property
    def _state(self) -> ReadingState:
        if self._decoder is not None:
            self._at_rest, self._decoder = self._decoder.state(), None
        if self._at_rest is None:
            raise RuntimeError("a session without a state")
        return self._at_rest

    @_state.setter
    def _state(self, state: ReadingState) -> None:
        self._at_rest, self._decoder = state, None

    def _decoding(self) -> Decoder:
        """The decoder that has the state from now on, until something else is wanted of the session."""
        if self._decoder is None:
            self._decoder, self._at_rest = Decoder(self.model, self._state, self.inner, learn=self.learn), None
        return self._decoder

    def drift(self) -> float:
        """How far reading has moved the fast weights: ‖W − W_0‖ / ‖W_0‖; 0 for a model without any."""
        pairs = list(zip(matrices(self._state.fast), matrices(self.model.initial_fast_weights(1)), strict=True))
        if not pairs:
            return 0.0
        moved, initial = (torch.stack([x.detach().norm() for x in xs]).norm() for xs in _split(pairs))
        return (moved / initial).item()

    def read(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Reads more of the text, and learns from each mini-batch once it is complete.

        Returns:
            −log p of each token given everything before it, [n], in nats; NaN for the first token of all.

        Raises:
            UserError: a token id is not in the vocabulary; nothing has been read then.
        """
        tokens = torch.as_tensor(token_ids, dtype=torch.long).reshape(-1)
        self._check(tokens)
        result = read(
            self.model, self._state, tokens.to(self.model.device).unsqueeze(0), inner=self.inner, learn=self.learn
        )
        self._state = result.state
        self.inner_grad_norms = result.inner_grad_norm[0]
        window = self.model.config.window_size
        self._recent = (self._recent + tokens[-window:].tolist())[-window:]
        return result.nll[0]

    def generate(
        self,
        max_tokens: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """Continues the text, token by token; what it writes it has also read, and learned from.

        Args:
            max_tokens: how many at most.
            temperature: 0 always takes the likeliest token.
            top_p: sample from the smallest set of likeliest tokens that holds this much probability.
            top_k: sample from this many of the likeliest.
            repetition_penalty: divides positive and multiplies negative logits of tokens in the last window
                (arXiv 1909.05858); 1 changes nothing.
            seed: makes the draw repeatable.
            stop_ids: ends before one of these, which is neither given nor read.

        Raises:
            UserError: a setting is out of range, or nothing has been read yet.
        """
        _check_sampling(max_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        if not self.position:
            raise UserError("there is nothing to continue; give a prompt, or read a text first")
        return self._generate(max_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop_ids)

    def _generate(
        self,
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int | None,
        repetition_penalty: float,
        seed: int | None,
        stop_ids: Collection[int],
    ) -> Iterator[int]:
        generator = torch.Generator(self.model.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        window = self.model.config.window_size
        for _ in range(max_tokens):
            decoder = self._decoding()
            logits = decoder.logits()[0]
            if repetition_penalty != 1.0:
                logits = _penalised(logits, self._recent, repetition_penalty)
            token = _draw(logits, temperature, top_p, top_k, generator)
            if token in stop_ids:
                return
            decoder.read(torch.tensor([token], device=self.model.device))
            self._recent = [*self._recent, token][-window:]
            yield token

    def fork(self) -> Session:
        """Another reader of the same text up to here. It shares all memory until one of the two reads on."""
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__)
        twin._recent = list(self._recent)
        return twin

    def save(self, path: str | Path) -> None:
        """Writes the session to a file: afterwards it is there whole, or what was there before is unchanged."""
        state = self._state
        tensors = {f"fast.{i}": w for i, w in enumerate(matrices(state.fast))}
        for half, pasts in (("lower", state.lower_pasts), ("upper", state.upper_pasts)):
            for i, past in enumerate(pasts):
                tensors |= {f"{half}.{i}.{name}": x for name, x in zip(past._fields, past, strict=True)}
        tensors |= {name: getattr(state, name) for name in ("hidden", "targets", "targets_mask", "output")}
        tensors["recent"] = torch.tensor(self._recent, dtype=torch.long)
        metadata = {
            "model_fingerprint": self._model_fingerprint(),
            "position": state.position,
            "learn": self.learn,
            "inner": dataclasses.asdict(self.inner),
        }
        write_tensors_atomically(path, {name: x.contiguous() for name, x in tensors.items()}, metadata, kind=KIND)

    @classmethod
    def restore(cls, path: str | Path, model: Transformer, *, fingerprint: str | None = None) -> Session:
        """The session that was saved at `path`. It goes on exactly as if it had never been saved.

        Raises:
            UserError: the file is damaged, no session, or of another model.
        """
        tensors, metadata = read_tensors(path, kind=KIND)
        try:
            session = cls(
                model,
                InnerConfig.from_dict(metadata["inner"]),
                learn=metadata["learn"],
                fingerprint=fingerprint,
            )
            if metadata["model_fingerprint"] != session._model_fingerprint():
                raise UserError(f"{path} belongs to another model; give the model that read it")
            session._recent = tensors.pop("recent").tolist()
            session._state = _state(session._state, metadata["position"], tensors, model.device)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not a complete session: {error}; restore it from a copy") from None
        return session

    def _model_fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.model)
        return self._fingerprint

    def _check(self, tokens: Tensor) -> None:
        V = self.model.config.vocab_size
        wrong = tokens[(tokens < 0) | (tokens >= V)]
        if wrong.numel():
            raise UserError(f"token id {wrong[0].item()} is not in the vocabulary of {V}; use the model's tokenizer")


def _split(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """What was added to each weight, and the initial weights."""
    return [w - w0 for w, w0 in pairs], [w0 for _, w0 in pairs]


def _state(empty: ReadingState, position: int, tensors: dict[str, Tensor], device: torch.device) -> ReadingState:
    """The state that `Session.save` took apart; `empty` is the model's and gives the number and types of the parts."""

    def part(name: str, like: Tensor) -> Tensor:
        return tensors[name].to(device, like.dtype)  # the model may compute in another type than the one that saved

    def pasts(half: str, like: tuple[MixerPast, ...]) -> tuple[MixerPast, ...]:
        return tuple(
            type(past)(*(part(f"{half}.{i}.{name}", x) for name, x in zip(past._fields, past, strict=True)))
            for i, past in enumerate(like)
        )

    fast = [part(f"fast.{i}", w) for i, w in enumerate(matrices(empty.fast))]
    return ReadingState(
        position=position,
        fast=from_matrices(fast),
        lower_pasts=pasts("lower", empty.lower_pasts),
        upper_pasts=pasts("upper", empty.upper_pasts),
        hidden=part("hidden", empty.hidden),
        targets=part("targets", empty.targets),
        targets_mask=part("targets_mask", empty.targets_mask),
        output=part("output", empty.output),
    )


def _check_sampling(
    max_tokens: int, temperature: float, top_p: float, top_k: int | None, repetition_penalty: float, seed: int | None
) -> None:
    """Raises `UserError` for the first setting that is out of range; comparisons are written so that NaN is."""
    if max_tokens < 0:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must lie above 0 and at most at 1")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1")
    if not 0 < repetition_penalty < float("inf"):
        raise UserError(f"repetition_penalty is {repetition_penalty}; it must be above 0, and 1 changes nothing")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must fit into 64 bits")


def _penalised(logits: Tensor, recent: list[int], penalty: float) -> Tensor:
    ids = torch.tensor(sorted(set(recent)), device=logits.device)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty).nan_to_num())


def _draw(logits: Tensor, temperature: float, top_p: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.sort(descending=True, stable=True)
    # differences, and no smaller divisor: a temperature next to 0 then takes the likeliest instead of overflowing
    p = ((values[: top_k or None] - values[0]) / max(temperature, torch.finfo(values.dtype).tiny)).softmax(-1)
    if top_p < 1:
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)  # the token that crosses the line is kept
    return int(ids[torch.multinomial(p, 1, generator=generator)])
