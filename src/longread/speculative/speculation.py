"""A reader drafts, another model verifies: what is written is the verifier's, at the pace of the drafter's luck.

The drafter goes on learning from the text that is written. Its guesses are made on a decoder that is thrown away, so a
guess that is not kept leaves no trace in it: states are values.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longread.config import UserError
from longread.inner_loop import Decoder
from longread.session import Session
from longread.session.sampling import Sampling, probabilities, seeded
from longread.speculative.rejection import verdict
from longread.speculative.verifier import Verifier

DRAFT_TOKENS = 4


class Round(NamedTuple):
    """One pass of the verifier."""

    position: int
    """Of the verifier before it."""
    drafted: int
    accepted: int
    """Of the drafted tokens, the first so many; there is one more token from the verifier itself."""


class Speculation:
    """Two readers of one text that write it together.

    Args:
        verifier: whose text it is. It reads with its weights as they are: a model without fast weights, such as one
            with full attention, or a session with `learn` False.
        drafter: any session of the same vocabulary, at best a fast one; if it learns, it goes on learning from what is
            written. Both should have read the same text. If they have not, only the speed suffers.
        draft_tokens: how many it guesses in each round.

    Raises:
        UserError: the two do not go together.
    """

    def __init__(self, verifier: Session, drafter: Session, *, draft_tokens: int = DRAFT_TOKENS) -> None:
        sizes = [session.model.config.vocab_size for session in (verifier, drafter)]
        if sizes[0] != sizes[1]:
            raise UserError(f"the verifier knows {sizes[0]} tokens and the drafter {sizes[1]}; both need one tokenizer")
        if draft_tokens < 1:
            raise UserError(f"draft_tokens is {draft_tokens}; it must be at least 1")
        if verifier.model.config.mixer != "attention":
            raise UserError(
                f"mixer {verifier.model.config.mixer} cannot take tokens back, so it cannot verify; let it draft"
            )
        verifier.model.config.check_nothing_kept("a verifier")
        self.verifier, self.drafter, self.draft_tokens = verifier, drafter, draft_tokens
        self.rounds: list[Round] = []
        """Of all calls of `generate`."""

    def read(self, text: str | Sequence[int] | Tensor) -> Tensor:
        """Both read more of the text, as `Session.read` does; returns the verifier's −log p of each token, [n]."""
        nll = self.verifier.read(text)
        self.drafter.read(text)
        return nll

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
    ) -> Generator[int, None, None]:
        """Continues the text as `Session.generate` of the verifier does: from the same distribution, and with
        temperature 0 the same tokens. A seed repeats the text, but not the verifier's own text for that seed.

        When the iterator ends or is closed, both sessions have read what it has given, and nothing else.

        Raises:
            UserError: a setting is out of range, nothing has been read yet, or the verifier learns.
        """
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop_ids=frozenset(stop_ids),
        )
        for name, session in (("verifier", self.verifier), ("drafter", self.drafter)):
            if not session.position:
                raise UserError(f"the {name} has nothing to continue; give a prompt, or read a text first")
        if self.verifier.learn and self.verifier.model.config.num_suffix_blocks:
            raise UserError("the verifier learns while it writes, so it cannot look ahead; set its `learn` to False")
        return self._generate(sampling)

    def _generate(self, sampling: Sampling) -> Generator[int, None, None]:
        sampler, generator = _Sampler(sampling, self.verifier), seeded(sampling.seed, self.verifier.model.device)
        verifier = Verifier(self.verifier.model, self.verifier.state)
        written: list[int] = []
        unread: list[int] = []  # what the verifier has not passed through yet: its own newest token
        try:
            while len(written) < sampling.max_tokens:
                new = self._round(verifier, unread, written, sampler, generator)
                unread = new[-1:]
                ended = next((i for i, token in enumerate(new) if token in sampling.stop_ids), None)
                given, told = new[:ended], 0
                try:
                    for token in given:
                        told += 1
                        written.append(token)
                        yield token
                finally:
                    if told:
                        self.drafter.read(given[:told])
                if ended is not None:
                    return
        finally:
            if written:
                self.verifier.read(written)

    def _round(
        self,
        verifier: Verifier,
        unread: list[int],
        written: list[int],
        sampler: _Sampler,
        generator: torch.Generator,
    ) -> list[int]:
        """The next tokens: guesses as far as they are kept, and one of the verifier's own."""
        device, position = self.verifier.model.device, verifier.position + len(unread)
        count = min(self.draft_tokens, sampler.sampling.max_tokens - len(written) - 1)
        guesses, q = self._draft(count, sampler, written, generator)
        fed = torch.cat((torch.tensor(unread, dtype=torch.long, device=device), guesses))
        first = [] if unread else [verifier.logits().unsqueeze(0)]
        logits = torch.cat([*first, *([verifier.read(fed)] if len(fed) else [])])
        p = sampler(logits, [*written, *(guesses.tolist() if sampler.penalises else ())], len(written))
        uniform = torch.rand(count, generator=generator, device=device, dtype=p.dtype)
        accepted, rest = verdict(p, q, guesses, uniform)
        token = torch.multinomial(rest, 1, generator=generator)
        kept = int(accepted)
        verifier.take_back(count - kept)
        self.rounds.append(Round(position, count, kept))
        return [*guesses[:kept].tolist(), int(token)]

    def _draft(
        self, count: int, sampler: _Sampler, written: list[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Guesses, int64 [count], and what each was drawn from, [count, V]; on the verifier's device."""
        model, device = self.drafter.model, self.verifier.model.device
        decoder = Decoder(model, self.drafter.state, self.drafter.inner, learn=self.drafter.learn)
        guesses: list[Tensor] = []
        q: list[Tensor] = []
        for i in range(count):
            so_far = [int(guess) for guess in guesses] if sampler.penalises else []
            q += [sampler(decoder.logits().to(device), [*written, *so_far], len(written) + i)[0]]
            guesses += [torch.multinomial(q[-1], 1, generator=generator)]
            if i < count - 1:
                decoder.read(guesses[-1].to(model.device))
        decoder.rest()  # the next round finds its places, and the graphs that were captured there
        if not count:
            V = model.config.vocab_size
            return torch.empty(0, dtype=torch.long, device=device), torch.empty(0, V, device=device)
        return torch.cat(guesses), torch.stack(q)


class _Sampler:
    """From logits to the distributions that tokens are drawn from."""

    def __init__(self, sampling: Sampling, reader: Session) -> None:
        self.sampling = sampling
        self._window, self._before = reader.model.config.window_size, reader.recent

    @property
    def penalises(self) -> bool:
        return self.sampling.repetition_penalty != 1.0

    def __call__(self, logits: Tensor, written: list[int], first: int) -> Tensor:
        """[n, V] from logits [n, V], of which row i follows `first` + i of the tokens written."""
        texts = [[*self._before, *written[: first + i]][-self._window :] for i in range(len(logits))]
        return probabilities(logits, self.sampling, texts)
