"""One reader: it reads, learns, continues a text, forks, and is kept in a file.

A session is a model, the state of what it has read (`longread.inner_loop.reading`), and the newest tokens, which
the repetition penalty looks at. Its size does not depend on how much it has read.

With a tokenizer it reads texts too. A text begins with what the tokenizer puts there (`Tokenizer.beginning`, BOS), read
before the first `str`; token ids are read exactly as they are given.

Learning cannot break it (`longread.inner_loop.read_guarded`): an inner step that is no number or far too long is
refused, and where many steps have led astray they are taken back. Both are counted as rolled back.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longread.config import KEPT_RULE, InnerConfig, UserError
from longread.files import Layout, read_tensors, write_tensors_atomically
from longread.inner_loop import Decoder, ReadingState, begin, drift, read_guarded
from longread.inner_loop.step import matrices
from longread.model import Transformer, fingerprint_of
from longread.session.sampling import Sampling, choose, seeded
from longread.session.storage import STORAGES, Storage, check_layout, packed, unpacked
from longread.session.text import TextPrefix, count_of, fixed_width, piece_lengths, text_of
from longread.tokenizer import Tokenizer

KIND = "session"
PIECE = 65_536
"""Tokens after which it is looked whether learning has gone astray, in one call of `read`."""


@dataclass(frozen=True)
class Description:
    """Facts about a session at one moment."""

    position: int
    """Tokens read."""
    waiting: int
    """Of these, the tokens of the unfinished mini-batch, from which nothing has been learned yet."""
    learn: bool
    nbytes: int
    """Of everything it remembers."""
    fast_nbytes: int
    """Of the fast weights alone."""
    drift: float
    """‖W − W_0‖ / ‖W_0‖ of the fast weights."""
    steps: int
    """Inner steps that reading and writing came to, those rolled back included."""
    rolled_back: int
    """Inner steps that were refused or taken back because they did damage."""
    device: str
    dtype: str
    """Of the products; fast weights are at least float32."""


class Session:
    """A text being read by a model that learns from it.

    Args:
        model: its parameters are shared between sessions and never changed.
        inner: rate and clip of the steps.
        learn: False reads with the weights as they are.
        fingerprint: of the model, where it is already known; it is computed otherwise, when the session is saved.
        tokenizer: the model's, to read texts with.
    """

    def __init__(
        self,
        model: Transformer,
        inner: InnerConfig,
        *,
        learn: bool = True,
        fingerprint: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.model, self.inner, self.tokenizer = model, inner, tokenizer
        self._learn = learn
        self._fingerprint = fingerprint
        self._held: ReadingState | Decoder = begin(model)  # a decoder that goes on with it, once something was written
        self._recent: list[int] = []
        self._steps = 0
        self._rolled_back: int | Tensor = 0  # a tensor until it is asked for: a GPU is not waited for
        self._text: TextPrefix | None = None
        self.inner_grad_norms = torch.empty(0)
        """Norms, before clipping, of the gradients of the steps that the newest call of `read` came to, [steps]."""

    @classmethod
    def resume(
        cls,
        model: Transformer,
        inner: InnerConfig,
        state: ReadingState,
        *,
        learn: bool = True,
        recent: Sequence[int] = (),
        steps: int = 0,
        rolled_back: int = 0,
        fingerprint: str | None = None,
    ) -> Session:
        """A session that goes on from a state of one text, with what else there is to know of it."""
        session = cls(model, inner, learn=learn, fingerprint=fingerprint)
        session._held, session._recent = state, list(recent)
        session._counted(steps, rolled_back)
        return session

    @property
    def recent(self) -> list[int]:
        """The newest tokens, at most a window of them, oldest first."""
        return list(self._recent)

    @property
    def text(self) -> TextPrefix | None:
        """How far it is in a text, where whoever reads has said so and nothing else has been read since."""
        return self._text if self._text is not None and self._text.position == self.position else None

    @text.setter
    def text(self, text: TextPrefix | None) -> None:
        self._text = text

    @property
    def learn(self) -> bool:
        """Whether it learns from what it reads, and from what it writes; can be changed at any time."""
        return self._learn

    @learn.setter
    def learn(self, learn: bool) -> None:
        if learn != self._learn:
            self._held, self._learn = self._settled(), learn

    @property
    def position(self) -> int:
        """Tokens read."""
        return self._held.position

    @property
    def nbytes(self) -> int:
        """Bytes of everything the session remembers."""
        return self._held.facts.nbytes

    @property
    def steps(self) -> int:
        """Inner steps that reading and writing came to, those rolled back included."""
        return self._steps + (self._held.steps if isinstance(self._held, Decoder) else 0)

    @property
    def rolled_back(self) -> int:
        """Inner steps that were refused or taken back because they did damage: what they were about is only read."""
        if isinstance(self._held, Decoder):
            return int(self._rolled_back) + int(self._held.rolled_back)
        self._rolled_back = int(self._rolled_back)
        return self._rolled_back

    @property
    def state(self) -> ReadingState:
        """What is left of the text; a value that later reading does not change. While it writes, a copy."""
        return self._held.state() if isinstance(self._held, Decoder) else self._held

    def _settled(self) -> ReadingState:
        """The state, which no decoder goes on with any more."""
        if isinstance(self._held, Decoder):
            decoder = self._held
            (self._held,) = decoder.end()
            self._counted(decoder.steps, decoder.rolled_back)
        return self._held

    def _counted(self, steps: int, rolled_back: int | Tensor) -> None:
        self._steps += steps
        self._rolled_back = self._rolled_back + rolled_back

    def _decoding(self) -> Decoder:
        """The decoder that has the state from now on, until the session reads something else."""
        if not isinstance(self._held, Decoder):
            self._held = Decoder(self.model, self._held, self.inner, learn=self.learn)
        return self._held

    def drift(self) -> float:
        """How far reading has moved the fast weights (`longread.inner_loop.drift`); 0 for a model without any."""
        fast = self._held.facts.fast
        return drift(self.model, fast).item() if fast else 0.0

    def __repr__(self) -> str:
        facts = [f"{self.position:,} tokens read", f"{self.steps:,} inner steps"]
        if self.rolled_back:
            facts.append(f"{self.rolled_back:,} rolled back")
        facts += [f"drift {self.drift():.3f}", f"{self.nbytes / 2**20:.1f} MiB"]
        facts += ["learning" if self.learn else "frozen", f"on {self.model.device}"]
        return f"<Session: {', '.join(facts)}>"

    def read(self, text: str | Sequence[int] | Tensor) -> Tensor:
        """Reads more of the text, and learns from each mini-batch once it is complete.

        Args:
            text: token ids, read as they are; or, if the session has a tokenizer, a `str`. The first `str` of a session
                that has read nothing begins the text: what the tokenizer puts there is read before it. A whole text
                gives bit for bit what `longread read` gives. Each `str` is encoded by itself, so cut a text between
                words.

        Returns:
            −log p of each token given everything before it, [n], in nats. Of a `str`, these are its own tokens. NaN
            for the first token of all, which nothing predicts: a `str` has none where its tokenizer has a BOS.

        Raises:
            UserError: a token id is not in the vocabulary, or there is no tokenizer for a `str`; nothing has been read
                then.
        """
        if isinstance(text, str):
            tokenizer = self._text_tokenizer()
            beginning = [] if self.position else tokenizer.beginning
            begins = not self.position or self._recent[-1:] == tokenizer.beginning
            ids = tokenizer.encode(text) if begins else tokenizer.encode_inside(text)[0]
            tokens = self._checked([*beginning, *ids])
            lengths = piece_lengths(self.position, len(tokens), self.model.config, self.model.device.type)
            return self._take_in(tokens, lengths)[len(beginning) :]
        return self._take_in(self._checked(text), PIECE)

    def _take_in(self, tokens: Tensor, lengths: int | list[int]) -> Tensor:
        nll, norms = [], []
        for piece in tokens.split(lengths):
            row = piece.to(self.model.device).unsqueeze(0)
            found = read_guarded(self.model, self._settled(), row, inner=self.inner, learn=self.learn)
            self._held = found.state
            self._counted(found.rolled_back.shape[1], found.rolled_back.sum())
            nll.append(found.nll[0])
            norms.append(found.inner_grad_norm[0])
        self.inner_grad_norms = torch.cat(norms)
        window = self.model.config.window_size
        self._recent = (self._recent + tokens[-window:].tolist())[-window:]
        return torch.cat(nll)

    def score(self, text: str | Sequence[int] | Tensor) -> Tensor:
        """What `read` would give for it; the session stays as it is."""
        return self.fork().read(text)

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
        learn: bool | None = None,
    ) -> Generator[int, None, None]:
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
            learn: False does not learn from what it writes, nor from the mini-batch that this interrupts; afterwards
                `self.learn` is what it was. None: as `self.learn` says.

        Raises:
            UserError: a setting is out of range, or nothing has been read yet.
        """
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop_ids=stop_ids,
        )
        if not self.position:
            raise UserError("there is nothing to continue; give a prompt, or read a text first")
        written = self._generate(sampling)
        return written if learn is None else self._learning(learn, written)

    def _learning(self, learn: bool, written: Generator[int, None, None]) -> Generator[int, None, None]:
        """The same tokens, written with `learn` as given."""
        before, self.learn = self.learn, learn
        try:
            yield from written
        finally:
            self.learn = before

    def _generate(self, sampling: Sampling) -> Generator[int, None, None]:
        generator = seeded(sampling.seed, self.model.device)
        window = self.model.config.window_size
        try:
            for _ in range(sampling.max_tokens):
                decoder = self._decoding()
                if sampling.takes_likeliest:
                    ((token, _),) = decoder.likeliest()
                    chosen = torch.tensor([token])
                else:
                    chosen = choose(decoder.logits(), [sampling], [self._recent], [generator])
                    token = int(chosen)
                if token in sampling.stop_ids:
                    return
                decoder.read(chosen)
                self._recent = [*self._recent, token][-window:]
                yield token
        finally:
            if isinstance(self._held, Decoder):
                self._held.rest()

    def write(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 200,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stops: Sequence[str] = (),
    ) -> Generator[str, None, None]:
        """Reads a prompt and continues the text, as `longread generate` does; gives the text as it becomes certain.

        Args:
            prompt: read at once, before the first piece of text is asked for.
            stops: ends before the first of these texts, of which the session then has read nothing.

        The others are those of `generate`. A text also ends where the model would begin another.

        Raises:
            UserError: a setting is out of range, there is nothing to continue, or the session has no tokenizer.
        """
        tokenizer = self._text_tokenizer()
        if "" in stops:
            raise UserError("a stop text is empty; give the text before which to end")
        self.read(prompt)
        ids = self.generate(
            max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop_ids=tokenizer.beginning,
        )
        return text_of(ids, tokenizer, [self], stops=stops)

    def fork(self) -> Session:
        """Another reader of the same text up to here. It shares all memory until one of the two reads on; of a session
        that writes it has copies, but for the fast weights.
        """
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__ | {"_held": self.state, "_recent": list(self._recent)})
        if isinstance(self._held, Decoder):
            twin._counted(self._held.steps, self._held.rolled_back)
        return twin

    def go_back(self, before: Session) -> None:
        """Forgets all that was read since `before` was forked off."""
        self._held, self._recent = before.state, before.recent
        self._steps, self._rolled_back = before.steps, before.rolled_back

    def describe(self) -> Description:
        """Position, size, drift and health, as facts that can be shown."""
        facts = self._held.facts
        return Description(
            position=facts.position,
            waiting=facts.waiting,
            learn=self.learn,
            nbytes=facts.nbytes,
            fast_nbytes=sum(w.nbytes for w in matrices(facts.fast)),
            drift=self.drift(),
            steps=self.steps,
            rolled_back=self.rolled_back,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
        )

    def save(self, path: str | Path, *, storage: Storage = "exact") -> None:
        """Writes the session to a file that only its owner may read: it is there whole, or what was there before is.

        Args:
            storage: "exact"; or rounded to bfloat16, "delta" with less loss for the fast weights than "bfloat16"
                (see `longread.session.storage`).

        Raises:
            UserError: the file cannot be written, the storage is unknown, or the session is not finite.
        """
        state = self.state
        counts = {"position": state.position, "steps": self.steps, "rolled_back": self.rolled_back}
        metadata = {
            "model_fingerprint": self._model_fingerprint(),
            "learn": self.learn,
            "inner": self.inner.as_dict(),
            "storage": storage,
            **{name: fixed_width(count) for name, count in counts.items()},
        }
        config = self.model.config
        if config.kept_tokens:  # so that whoever restores it need not say it
            kept = {"tokens": config.kept_tokens, "run": config.kept_run, "distance": config.kept_distance}
            metadata["kept"] = kept | {"rule": KEPT_RULE}
        if self.text is not None:
            metadata["text"] = self.text.as_metadata()
        tensors = packed(state, self._recent, self.model, storage)
        write_tensors_atomically(path, tensors, metadata, kind=KIND, private=True)  # it holds tokens, and more

    @classmethod
    def restore(
        cls,
        path: str | Path,
        model: Transformer,
        *,
        fingerprint: str | None = None,
        device: torch.device | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Session:
        """The session that was saved at `path`, in the types of `model` and on its device, or to begin with on another.

        Saved exactly, and restored in the same types, it goes on as if it had never been saved. The file may come from
        anywhere: its names, types and shapes are checked before its contents are read, and these before they are used.

        Raises:
            UserError: the file is damaged, no session, no valid one, or of another model.
        """
        made: list[tuple[Session, int]] = []

        def check(layout: Layout, metadata: dict[str, Any]) -> None:
            made.append(cls._of_header(path, metadata, model, fingerprint))
            check_layout(path, layout, model, made[0][1])

        tensors, metadata = read_tensors(path, kind=KIND, check=check)
        ((session, position),) = made
        session.tokenizer = tokenizer
        session._held, session._recent = unpacked(
            path, tensors, model, position, metadata["storage"], device or model.device
        )
        return session

    @classmethod
    def _of_header(
        cls, path: str | Path, metadata: dict[str, Any], model: Transformer, fingerprint: str | None
    ) -> tuple[Session, int]:
        """A session that has read nothing yet, with the settings of a saved one, and the position of that one."""
        try:
            inner, learn = InnerConfig.from_dict(metadata["inner"]), metadata["learn"]
            if not isinstance(learn, bool) or metadata["storage"] not in STORAGES:
                raise ValueError(f"learn is {learn!r:.60} and storage {metadata['storage']!r:.60}")
            counts = [count_of(metadata, name) for name in ("position", "steps", "rolled_back")]
            text = TextPrefix.from_metadata(metadata["text"]) if "text" in metadata else None
        except UserError as error:
            raise UserError(f"{path} is no valid session: {error!s:.200}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a complete session: {error!s:.200}; restore it from a copy") from None
        session = cls(model, inner, learn=learn, fingerprint=fingerprint)
        kept = metadata.get("kept")
        if model.config.kept_tokens and isinstance(kept, dict) and kept.get("rule") != KEPT_RULE:
            raise UserError(f"{path} keeps tokens that another version chose by another rule; read its text again")
        if metadata.get("model_fingerprint") != session._model_fingerprint():
            raise UserError(f"{path} belongs to another model; give the model that read it")
        session._counted(*counts[1:])
        session.text = text
        return session, counts[0]

    def _model_fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.model)
        return self._fingerprint

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this session has no tokenizer: give token ids, or open the model with longread.open_model")
        return self.tokenizer

    def _checked(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """The tokens, int64 [n], all in the vocabulary."""
        tokens, V = torch.as_tensor(token_ids, dtype=torch.long).reshape(-1), self.model.config.vocab_size
        wrong = tokens[(tokens < 0) | (tokens >= V)]
        if wrong.numel():
            raise UserError(f"token id {wrong[0].item()} is not in the vocabulary of {V}; use the model's tokenizer")
        return tokens
