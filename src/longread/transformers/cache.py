"""The cache of Transformers: for each sequence of a batch a session, at a position of its own.

A cache is used up by what is read with it, like any other of Transformers. `fork` (and `copy.deepcopy`) make another
that goes on from the same texts; both share all memory until one of them reads on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache

from longread.config import UserError
from longread.inner_loop import Decoder, ReadingState, begin
from longread.model import Transformer
from longread.session import Session, Storage


class ReadingModel(Protocol):
    """A `LongreadForCausalLM`."""

    config: Any
    fingerprint: str | None

    @property
    def network(self) -> Transformer:
        """The network."""

    def settle_compute_dtype(self) -> None:
        """Makes the network compute in the type that a new text is read in."""


@dataclass
class Row:
    """One sequence of the batch, but for what a decoder has of it."""

    state: ReadingState | None
    """None while a decoder has it."""
    steps: int = 0
    rolled_back: int | Tensor = 0
    recent: list[Tensor] = field(default_factory=list)
    """The newest tokens, in pieces [n]."""


class SessionCache(Cache):
    """The sessions of a batch. The rows of what a model is given go on where they are, each for itself.

    Args:
        model: a `LongreadForCausalLM`.
        learn: False reads with the weights as they are; None: as the model's configuration says.
    """

    def __init__(self, model: ReadingModel, *, learn: bool | None = None) -> None:
        super().__init__(layers=[])
        self.network, self.inner, self.fingerprint = model.network, model.config.inner_config, model.fingerprint
        self.learn: bool = model.config.learn if learn is None else learn
        self.columns = 0
        """Of what the model was given, padding included."""
        self.rows: list[Row] = []
        self.ended: Tensor | None = None
        """Rows into which nothing more is read while others are written, bool [B]."""
        self.compute_dtype: torch.dtype | None = None
        """Of the products with which it was begun; None: that of the parameters."""
        self._decoder: Decoder | None = None

    @classmethod
    def of(cls, model: ReadingModel, sessions: Iterable[Session]) -> SessionCache:
        """A cache that goes on from sessions, which stay as they are.

        Raises:
            UserError: there is none, one of them is of another model, or they do not agree in what they learn.
        """
        given = list(sessions)
        cache = cls(model)
        if not given:
            raise UserError("there is no session to go on from; give at least one")
        if any(session.model is not cache.network for session in given):
            raise UserError("a session is of another model; give those of this one")
        if any((session.learn, session.inner) != (given[0].learn, given[0].inner) for session in given):
            raise UserError("some sessions learn otherwise than others; make a cache of those that are alike")
        cache.learn, cache.inner = given[0].learn, given[0].inner
        for session in given:
            recent = torch.tensor(session.recent, dtype=torch.long)
            cache.rows.append(Row(session.state, session.steps, session.rolled_back, [recent]))
        cache.columns = max(session.position for session in given)
        cache.compute_dtype = given[0].state.hidden.dtype
        return cache

    @classmethod
    def restore(cls, path: str | Path, model: ReadingModel) -> SessionCache:
        """A cache of the one session that was saved at `path`, here or anywhere else in Longread.

        Raises:
            UserError: the file is damaged, no session, no valid one, or of another model.
        """
        model.settle_compute_dtype()
        return cls.of(model, [Session.restore(path, model.network, fingerprint=model.fingerprint)])

    @property
    def sessions(self) -> list[Session]:
        """A session for each row, that goes on from here; the cache stays as it is."""
        states = self._states()
        return [
            Session.resume(
                self.network,
                self.inner,
                state,
                learn=self.learn,
                recent=self.recent(i),
                steps=row.steps + (self._decoder.texts[i].steps if self._decoder else 0),
                rolled_back=int(row.rolled_back) + (int(self._decoder.texts[i].rolled_back) if self._decoder else 0),
                fingerprint=self.fingerprint,
            )
            for i, (row, state) in enumerate(zip(self.rows, states, strict=True))
        ]

    def save(self, path: str | Path, *, storage: Storage = "exact") -> None:
        """Writes the session to a file, as `longread.Session.save` does.

        Raises:
            UserError: as there; or there are several, each of which has to be saved by itself.
        """
        if len(self.rows) != 1:
            raise UserError(f"the cache holds {len(self.rows)} sessions; save each of cache.sessions in its own file")
        self.sessions[0].save(path, storage=storage)

    def fork(self) -> SessionCache:
        """Another cache that goes on from the same texts."""
        twin = SessionCache.__new__(SessionCache)
        twin.__dict__.update(self.__dict__ | {"rows": self.settled(), "_decoder": None})
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionCache:
        return self.fork()

    def settled(self) -> list[Row]:
        """The rows with all that is known of them; values. No decoder has anything of them afterwards."""
        if self._decoder is not None:
            for row, text, state in zip(self.rows, self._decoder.texts, self._decoder.end(), strict=True):
                row.state, row.steps = state, row.steps + text.steps
                row.rolled_back = row.rolled_back + text.rolled_back
            self._decoder = None
        return [dataclasses.replace(row, recent=list(row.recent)) for row in self.rows]

    def decoder(self) -> Decoder:
        """The decoder that has the states from now on, until something else is wanted of the cache."""
        if self._decoder is None:
            self._decoder = Decoder(self.network, self._states(), self.inner, learn=self.learn)
            for row in self.rows:
                row.state = None
        return self._decoder

    def rest(self) -> None:
        """Lets others have the memory in which tokens are written one by one; whoever goes on gets it back."""
        if self._decoder is not None:
            self._decoder.rest()

    def begin(self, batch_size: int) -> None:
        """Makes a row for each sequence of a batch, where there is none yet. Raises `UserError` if there are others."""
        if not self.rows:
            self.rows = [Row(begin(self.network)) for _ in range(batch_size)]
        if len(self.rows) != batch_size:
            raise UserError(f"the cache holds {len(self.rows)} sequences, and {batch_size} are given; give as many")

    def took(self, row: int, tokens: Tensor) -> None:
        """Books tokens [n] that a row has read."""
        recent, window = self.rows[row].recent, self.network.config.window_size
        recent.append(tokens[-window:])
        if len(recent) > 2 * window:
            self.rows[row].recent = [torch.cat([x.to(tokens.device) for x in recent])[-window:]]

    def recent(self, row: int) -> list[int]:
        """The newest tokens of a row, at most a window of them, oldest first."""
        recent = self.rows[row].recent
        return torch.cat([x.cpu() for x in recent])[-self.network.config.window_size :].tolist() if recent else []

    def has_read(self, input_ids: Tensor, mask: Tensor) -> bool:
        """Whether the tokens [B, n] of a mask are, of one row at least, what it has read last."""
        for row in range(len(self.rows)):
            tokens, recent = input_ids[row][mask[row].bool()].tolist(), self.recent(row)
            count = min(len(tokens), len(recent))
            if count and tokens[-count:] == recent[-count:]:
                return True
        return False

    def has_left(self, row: int) -> bool:
        """Whether the decoder goes on without a row."""
        return self._decoder is not None and self._decoder.texts[row].last_logits is not None

    def position(self, row: int) -> int:
        """Tokens that a row has read."""
        return self._states()[row].position if self._decoder is None else self._decoder.texts[row].position

    def _states(self) -> list[ReadingState]:
        if self._decoder is not None:
            return self._decoder.states()
        return [row.state for row in self.rows if row.state is not None]

    def __repr__(self) -> str:
        positions = ", ".join(f"{self.position(i):,}" for i in range(len(self.rows)))
        return f"<SessionCache: {positions or 'nothing'} read, {'learning' if self.learn else 'frozen'}>"

    # What Transformers asks of a cache.

    def __len__(self) -> int:
        return self.network.config.num_blocks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were given so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a reader has no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The same in older versions."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first."""
        return len(self.rows) or -1

    @property
    def max_batch_size(self) -> int:
        """The same in older versions."""
        return self.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return bool(self.rows)

    @property
    def is_compileable(self) -> bool:
        """Its tensors do not keep their places."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Refuses: what was learned cannot be taken back."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """As if for one layer."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """As if for one layer: what has been read is cut off from what is given again."""
        return [False]

    def reset(self) -> None:
        """Forgets everything."""
        self.settled()
        self.columns, self.rows, self.ended = 0, [], None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times, one after the other."""
        self._take([i for i in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """The sequences with these indices."""
        self._take(torch.as_tensor(indices).tolist())

    def _take(self, indices: Sequence[int]) -> None:
        rows = self.settled()
        self.rows = [dataclasses.replace(rows[i], recent=list(rows[i].recent)) for i in indices]

    def crop(self, *arguments: Any) -> None:
        """Refused: raises `UserError`."""
        raise UserError("a reader cannot unlearn its newest tokens; fork the cache before it reads them")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: raises `UserError`."""
        raise UserError("a reader follows no beams; use greedy decoding or sampling")
