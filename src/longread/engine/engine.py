"""The engine: what other threads may call. The work itself is done by one thread (`worker.py`)."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from longread.config import InnerConfig, UserError
from longread.engine.curve import Curve
from longread.engine.interface import (
    Limits,
    Lost,
    SessionInfo,
)
from longread.engine.lanes import HOST
from longread.engine.members import Members, closing, unknown
from longread.engine.persistence import Persistence, recovered
from longread.engine.reader import Job, Reader
from longread.engine.remote import copy_in, copy_out, is_remote
from longread.engine.store import Store
from longread.engine.task import Task
from longread.engine.timings import TimeCounts
from longread.engine.worker import Worker
from longread.inner_loop import begin
from longread.model import Transformer, fingerprint_of
from longread.session import Sampling, Session

NO_LIMITS = Limits()


class Engine:
    """Many sessions of one model on one device.

    Tasks of different sessions run at once, in batches; those of one session run one after the other. What a session
    gives does not depend on the others, but for rounding (see `Limits.batch_invariant`). With a directory, a result
    that has been given survives any end of the process.

    Args:
        model: on the device and in the types that it shall compute in.
        inner: rate and clip of the steps, for new sessions.
        directory: where sessions are kept; it belongs to this engine alone, until it is closed or the process ends.
            None: sessions end with the engine.
        limits: of memory and numbers.
        fingerprint: of the model, where it is known; computed otherwise.

    Raises:
        UserError: the directory cannot be used, or another engine uses it; the limits hold not even one session.
    """

    def __init__(
        self,
        model: Transformer,
        inner: InnerConfig,
        *,
        directory: str | Path | None = None,
        limits: Limits = NO_LIMITS,
        fingerprint: str | None = None,
    ) -> None:
        self.model, self.inner, self.limits = model, inner, limits
        self.fingerprint = fingerprint or fingerprint_of(model)
        self.directory = None if directory is None else Path(directory).absolute()
        store = None if self.directory is None else Store(self.directory / "sessions", self.fingerprint)
        with contextlib.ExitStack() as undo:
            if store is not None:
                undo.callback(store.release)
            worker = self._worker = Worker(model, inner, limits)
            self._keeping = Persistence(model, inner, store, worker.lanes, worker.mover, worker.post)
            self._members = Members(worker, self._keeping, limits)
            self._keeping.lose = self._members.lose
            worker.files = self._keeping
            self._started = time.time()
            for found in store.recover() if store is not None else ():
                reader = recovered(found, model.config.window_size)
                worker.readers[reader.id] = reader
                self._keeping.adopt(reader, found.saved, found.events)
            worker.start()
            undo.pop_all()

    @property
    def lost(self) -> list[Lost]:
        """What could not be restored: whole sessions, and ends of sessions whose events are damaged."""
        return [] if self._keeping.store is None else list(self._keeping.store.lost)

    @property
    def restoring(self) -> int:
        """Sessions that are still being read again after a crash; they can be used, and take longer."""
        return sum(reader.restoring for reader in list(self._worker.readers.values()))

    # sessions

    def create(self, owner: str = "", *, learn: bool = True, label: str = "") -> SessionInfo:
        """A new session with a random 128-bit id. Raises `Busy` when there is no room for one more."""

        def work() -> Future[Any]:
            reader = self._members.new(owner, label, learn)
            reader.rest(begin(self.model))
            return self._add(reader, self._keeping.create if self._keeping.store else None)

        return self._worker.call(work)

    def info(self, session_id: str, owner: str | None = None) -> SessionInfo:
        """Facts about a session. Raises `UnknownSession`, also where it belongs to another than `owner`."""
        return self._worker.call(lambda: self._info(self._members.find(session_id, owner)))

    def losses(self, session_id: str, owner: str | None = None) -> Curve:
        """Mean losses of what a session has read, by position. They are kept with it and its forks, not in its file."""
        return self._worker.call(lambda: self._members.find(session_id, owner).losses.copy())

    def sessions(self, owner: str | None = None) -> list[SessionInfo]:
        """All sessions, or all of one owner, oldest first."""

        def work() -> list[SessionInfo]:
            readers = [reader for reader in self._members.present if owner in (None, reader.owner)]
            return [self._info(reader) for reader in sorted(readers, key=lambda reader: reader.created)]

        return self._worker.call(work)

    def update(self, session_id: str, *, learn: bool | None = None, label: str | None = None) -> SessionInfo:
        """Changes whether it learns, from the next token on, or what it is called."""

        def work() -> Any:
            reader = self._members.find(session_id)
            old_learn, old_label = reader.learn, reader.label
            self._set(reader, learn, label)
            info = self._info(reader)
            if not reader.durable:
                return info
            described = self._keeping.describe(reader)

            def undo() -> None:  # what nobody can keep has not happened; unless it has been changed again
                was_learning = old_learn if reader.learn == learn else None
                self._set(reader, was_learning, old_label if reader.label == label else None)

            def kept() -> SessionInfo:
                try:
                    described.result()
                except UserError:
                    self._worker.call(undo)
                    raise
                return info

            return kept

        return self._worker.call(work)

    def _set(self, reader: Reader, learn: bool | None, label: str | None) -> None:
        if learn is not None and learn != reader.learn:
            if reader.lane is not None and reader.job is not None:
                self._worker.lanes.leave(reader.job)
            self._keeping.flush(reader)
            reader.learn = learn
        if label is not None:
            reader.label = label

    def fork(self, session_id: str, label: str = "") -> SessionInfo:
        """Another session that has read the same. It takes no memory and no room on the disk of its own yet."""

        def work() -> Future[Any]:
            origin = self._members.find(session_id)
            return self._when_restored(origin, lambda: self._fork(origin, label))

        return self._worker.call(work)

    def _fork(self, origin: Reader, label: str) -> Any:
        reader = self._members.twin(origin, self._members.new(origin.owner, label, origin.learn))
        return self._add(reader, (lambda fork: self._keeping.fork(origin, fork)) if origin.durable else None)

    def save(self, session_id: str) -> Path:
        """Makes a snapshot of the session now, and returns its file, which a later snapshot replaces."""
        return self._saved(session_id, lambda reader: self._store.snapshot_path(reader.id))

    def export(self, session_id: str, to: str | None = None) -> Path:
        """Writes the session as it is now to a session file, which stays; returns its path.

        Args:
            to: an address like s3://bucket/name.safetensors (fsspec) for a copy that another engine can `restore`.
        """
        path = (self.directory or Path()) / "exports" / f"{session_id}.safetensors"
        self._saved(session_id, lambda reader: self._keeping.export(reader, path))
        if to is not None:
            copy_out(path, to)
        return path

    def _saved(self, session_id: str, then: Callable[[Reader], Any]) -> Path:
        def work() -> Future[Any]:
            reader, future, store = self._members.find(session_id), Future[Any](), self._store

            def kept(outcome: Any) -> None:
                if outcome is True:
                    future.set_result(then(reader))
                else:
                    error = (
                        outcome
                        if isinstance(outcome, UserError)
                        else UserError(f"session {session_id} could not be saved")
                    )
                    future.set_exception(error)

            def keep() -> Future[Any]:
                self._keeping.keep(reader, kept, always=not store.has_snapshot(session_id))
                return future

            return self._when_restored(reader, keep)

        return self._worker.call(work)

    def restore(self, path: str | Path, owner: str = "", label: str = "") -> SessionInfo:
        """A new session that goes on from a session file, a path or an address like s3://bucket/name.safetensors.

        Raises:
            UserError: the file is damaged, hostile, no session, or of another model.
        """
        if is_remote(path):
            with tempfile.TemporaryDirectory(dir=self.directory) as folder:
                copied = Path(folder) / "session.safetensors"
                copy_in(str(path), copied)
                return self.restore(copied, owner, label)

        def work() -> Any:
            reader = self._members.new(owner, label, learn=True)
            if self._keeping.store is not None:
                future = self._keeping.take_in(Path(path), reader)
            else:
                future = self._worker.mover.submit(
                    lambda: Session.restore(path, self.model, fingerprint=self.fingerprint, device=HOST)
                )
            return _then(future, lambda session: self._worker.call(lambda: self._restored(reader, session)))

        return self._worker.call(work)

    def _restored(self, reader: Reader, session: Session) -> SessionInfo:
        reader.rest(session.state)
        reader.tier = "host"
        reader.recent.extend(session.recent)
        reader.learn, reader.position = session.learn, session.position
        reader.steps, reader.rolled_back, reader.drift = session.steps, session.rolled_back, None
        reader.losses = Curve.beginning(session.position)
        reader.durable = self._keeping.store is not None
        self._worker.readers[reader.id] = reader
        return self._info(reader)

    def delete(self, session_id: str) -> None:
        """Stops what is under way, forgets the session and removes its files; when it returns, they are gone."""

        def work() -> Any:
            reader = self._members.find(session_id)
            reader.deleted = True
            for job in list(reader.jobs)[1:]:
                reader.jobs.remove(job)
                job.task._finish(unknown(session_id))
            for job in reader.jobs:
                job.task.cancel()
            if not reader.jobs:
                self._worker.readers.pop(session_id, None)
            durable, reader.durable = reader.durable, False
            return self._keeping.remove(reader) if durable else None

        self._worker.call(work)

    # tasks

    def append(
        self,
        session_id: str,
        tokens: Sequence[int],
        *,
        expected_position: int | None = None,
        key: str | None = None,
        wrote: bool = False,
    ) -> Task:
        """Reads tokens: events `Progress`, result `Appended`. The result is durable, and so are tokens read by then.

        Args:
            expected_position: of the session before; if it is elsewhere, the task raises `WrongPosition`, unless the
                same append was acknowledged before: then it gives the same answer again and reads nothing.
            key: makes the same append known without a position.
            wrote: the session, or a fork of it, wrote these tokens itself; their losses are not kept.
        """
        self._members.check_tokens(tokens)
        return self._submit(
            session_id,
            lambda task, reader: Job(task, reader, list(tokens), expected=expected_position, key=key, wrote=wrote),
        )

    def generate(self, session_id: str, sampling: Sampling) -> Task:
        """Continues the text: events `Token`, result `Finished`. The text is durable when there is a result."""
        return self._submit(session_id, lambda task, reader: Job(task, reader, sampling=sampling))

    def score(self, session_id: str | None, tokens: Sequence[int], *, learn: bool = True, logprobs: int = 0) -> Task:
        """Reads tokens and forgets them: events and result as of `append`, the session stays as it is.

        Args:
            id: None: as if nothing had been read before, learning or not as `learn` says.
            logprobs: how many of the likeliest tokens to report in the place of each (`Progress.top`).
        """
        self._members.check_tokens(tokens)
        return self._passing(
            session_id,
            learn if session_id is None else None,
            lambda task, reader: Job(task, reader, list(tokens), logprobs=logprobs),
        )

    def complete(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        session_id: str | None = None,
        learn: bool | None = None,
    ) -> Task:
        """Reads a prompt and continues it, in a session that lives as long as the task.

        Events `Progress` (with `top` where `sampling.logprobs` are asked for), then `Token`; result `Finished`.

        Args:
            session_id: goes on from what this session has read, and leaves it as it is; the prompt may be empty then.
            learn: while reading and writing; None: as the session does, and without one: yes.
        """
        self._members.check_tokens(tokens)
        if not len(tokens) and session_id is None:
            raise UserError("the prompt is empty; give at least one token")
        n = sampling.logprobs
        return self._passing(
            session_id, learn, lambda task, reader: Job(task, reader, list(tokens), sampling=sampling, logprobs=n)
        )

    def _submit(self, session_id: str, make: Callable[[Task, Reader], Job]) -> Task:
        task = Task()

        def work() -> None:
            self._members.check_waiting()
            self._worker.submit(make(task, self._members.find(session_id)))

        self._worker.call(work)
        return task

    def _passing(self, session_id: str | None, learn: bool | None, make: Callable[[Task, Reader], Job]) -> Task:
        task = Task()

        def work() -> None:
            self._members.check_waiting()
            if session_id is None:
                reader = self._members.bare("", "", learn is not False)
                reader.rest(begin(self.model))
                self._pass(make(task, reader))
                return
            origin = self._members.find(session_id)

            def start() -> None:
                learns = origin.learn if learn is None else learn
                self._pass(make(task, self._members.twin(origin, self._members.bare("", "", learns))))

            if self._keeping.state(origin) is not None and not origin.restoring:
                start()
            else:  # it must come back first: as a task of its own that reads nothing
                visit = Job(Task(), origin, replay=True)
                visit.task.subscribe(
                    lambda outcome: task._finish(outcome) if isinstance(outcome, Exception) else start()
                )
                self._worker.submit(visit)

        self._worker.call(work)
        return task

    def _pass(self, job: Job) -> None:
        """Submits work for a reader that is gone when it is done."""
        job.reader.deleted = True
        self._worker.readers[job.reader.id] = job.reader
        self._worker.submit(job)

    # the engine

    def stats(self) -> dict[str, float]:
        """Numbers for monitoring: counts since the start, and how much there is now."""

        def work() -> dict[str, float]:
            worker = self._worker
            readers = self._members.present
            used = worker.tiers.usage(worker.readers.values())
            store = self._keeping.store
            return {
                **worker.counts,
                "sessions": len(readers),
                **{f"sessions_{tier}": sum(r.tier == tier for r in readers) for tier in ("device", "host", "disk")},
                "bytes_device": used["device"],
                "bytes_host": used["host"],
                "bytes_disk": 0 if store is None else store.nbytes,
                "tasks": self._members.tasks,
                "writing": len(worker.lanes.jobs),
                "restoring": self.restoring,
                "lost": len(self.lost),
                "uptime_seconds": time.time() - self._started,
            }

        return self._worker.call(work)

    def timings(self) -> dict[str, TimeCounts]:
        """How long tasks have waited since the engine started, as histograms of seconds; asks nobody and never waits.

        `waiting`: from a task's acceptance to the first computing for it. `first_token`: from its acceptance to its
        first written token, a prompt's reading included. `next_token`: between two tokens of one task. The buckets end
        at `longread.engine.timings.BOUNDS`; counts are not cumulative, and only grow.
        """
        return self._worker.stopwatches.read()

    def close(self, timeout: float | None = None) -> None:
        """Stops texts at the end of a mini-batch or after a token, saves every session, and ends the thread.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; what has been acknowledged is durable all the same.
        """
        if self._members.closed:
            return
        self._members.closed = True
        worker = self._worker

        def stop() -> None:
            for reader in worker.readers.values():
                if reader.restoring:  # its journal is still there for the next start
                    reader.durable = False
                for job in list(reader.jobs):
                    if job.replay:
                        reader.jobs.remove(job)
                    elif not job.started:
                        reader.jobs.remove(job)
                        job.task._finish(closing())
                    job.task.cancel()
                keep = functools.partial(self._keeping.keep, reader, lambda kept: None)
                if reader.jobs:
                    reader.waiting.append(keep)
                else:
                    keep()

        worker.call(stop)
        worker.stop()
        worker.join(timeout)
        if worker.is_alive():
            raise TimeoutError(f"the engine is still busy after {timeout} seconds")
        self._keeping.close()
        worker.mover.shutdown()
        if self._keeping.store is not None:
            self._keeping.store.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # in the engine's thread

    def _info(self, reader: Reader) -> SessionInfo:
        self._keeping.drift(reader)
        return reader.info()

    def _add(self, reader: Reader, durable: Callable[[Reader], Future[Any]] | None) -> Any:
        """Takes a reader in, once its files are there; gives its facts."""
        if durable is None:
            self._worker.readers[reader.id] = reader
            return self._info(reader)

        def added() -> SessionInfo:
            reader.durable = True
            self._worker.readers[reader.id] = reader
            return self._info(reader)

        return _then(durable(reader), lambda _: self._worker.call(added))

    def _when_restored(self, reader: Reader, work: Callable[[], Any]) -> Any:
        """What `work` gives, now or when the reader's journal has been read again."""
        if not reader.restoring:
            return work()
        future: Future[Any] = Future()

        def later() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        reader.waiting.append(later)
        return future

    @property
    def _store(self) -> Store:
        return self._keeping.required


def _then(future: Future[Any], work: Callable[[Any], Any]) -> Callable[[], Any]:
    """For the caller's thread: what `work` makes of the future's result."""
    return lambda: work(future.result())
