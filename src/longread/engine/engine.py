"""The engine: what any thread may call.

What computes nothing is done in the thread that calls, under the lock of all records, which nobody holds while anything
is computed. Reading and writing are tasks for the one thread that computes (`scheduler.py`).
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from longread.config import InnerConfig, UserError
from longread.engine.curve import Curve
from longread.engine.interface import Limits, Lost, Quota, SessionInfo, TimeCounts
from longread.engine.jobs import Jobs, closing
from longread.engine.lanes import HOST
from longread.engine.persistence import Persistence, recovered
from longread.engine.records import Job, Reader, Task, digest_of
from longread.engine.registry import Registry, unknown
from longread.engine.scheduler import Scheduler
from longread.engine.snapshots import copy_in, copy_out, is_remote
from longread.engine.store import Store
from longread.model import Transformer, fingerprint_of
from longread.session import Sampling, Session

NO_LIMITS = Limits()

T = TypeVar("T")


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
            jobs = self._jobs = Jobs(model, inner, limits)
            self._lock = jobs.lock
            self._persistence = Persistence(model, inner, store, jobs.lanes, jobs.mover, jobs.lock.run)
            self._registry = Registry(jobs, self._persistence, limits)
            self._persistence.lose = self._registry.lose
            jobs.persistence = self._persistence
            self._scheduler = Scheduler(jobs)
            self._started = time.time()
            for found in store.recover() if store is not None else ():
                reader = recovered(found, model.config.window_size)
                jobs.readers[reader.id] = reader
                self._persistence.adopt(reader, found.saved, found.events)
            self._scheduler.start()
            undo.pop_all()

    @property
    def lost(self) -> list[Lost]:
        """What could not be restored: whole sessions, and ends of sessions whose events are damaged."""
        return [] if self._persistence.store is None else list(self._persistence.store.lost)

    @property
    def restoring(self) -> int:
        """Sessions that are still being read again after a crash; they can be used, and take longer."""
        with self._lock:
            return sum(reader.restoring for reader in self._jobs.readers.values())

    # sessions

    def create(
        self, owner: str = "", *, learn: bool = True, label: str = "", quota: Quota | None = None
    ) -> SessionInfo:
        """A new session with a random 128-bit id.

        Raises `Busy` when there is no room for one more, and `OverQuota` when the owner may have no more.
        """
        with self._registry.joining(owner, label, learn, quota) as reader:
            if self._persistence.store is not None:
                with self._lock:
                    created = self._persistence.create(reader)
                created.result()
                reader.durable = True
        return reader.info()

    def info(self, session_id: str, owner: str | None = None) -> SessionInfo:
        """Facts about a session. Raises `UnknownSession`, also where it belongs to another than `owner`.

        This and `sessions`, `losses`, `stats` and `timings` answer at once, whatever is being computed. While a session
        reads, `drift` is some steps old; while it writes, as it was when that began.
        """
        with self._lock:
            return self._registry.find(session_id, owner).info()

    def losses(self, session_id: str, owner: str | None = None) -> Curve:
        """Mean losses of what a session has read, by position. They are kept with it and its forks, not in its file."""
        with self._lock:
            return self._registry.find(session_id, owner).losses.copy()

    def sessions(self, owner: str | None = None) -> list[SessionInfo]:
        """All sessions, or all of one owner, oldest first."""
        with self._lock:
            infos = [reader.info() for reader in self._registry.present if owner in (None, reader.owner)]
        return sorted(infos, key=lambda info: info.created)

    def update(self, session_id: str, *, learn: bool | None = None, label: str | None = None) -> SessionInfo:
        """Changes whether it learns, from the next token on, or what it is called."""

        def change() -> tuple[SessionInfo, Future[None] | None, Callable[[], None]]:
            reader = self._registry.find(session_id)
            old_learn, old_label = reader.learn, reader.label
            self._set(reader, learn, label)

            def undo() -> None:  # what nobody can keep has not happened; unless it has been changed again
                was_learning = old_learn if reader.learn == learn else None
                self._set(reader, was_learning, old_label if reader.label == label else None)

            return reader.info(), self._persistence.describe(reader) if reader.durable else None, undo

        info, described, undo = self._between_pieces(session_id, change, at_once=learn is None)
        try:
            if described is not None:
                described.result()
        except UserError:
            self._between_pieces(session_id, undo, at_once=learn is None)
            raise
        return info

    def _set(self, reader: Reader, learn: bool | None, label: str | None) -> None:
        if learn is not None and learn != reader.learn:
            if reader.lane is not None and reader.job is not None:
                self._jobs.lanes.leave(reader.job)
            self._persistence.flush(reader)
            reader.learn = learn
        if label is not None:
            reader.label = label

    def fork(self, session_id: str, label: str = "", *, quota: Quota | None = None) -> SessionInfo:
        """Another session that has read the same. It takes no memory and no room on the disk of its own yet.

        Raises `Busy` when there is no room for one more, and `OverQuota` when the owner may have no more.
        """
        with self._lock:
            origin = self._registry.when_restored(session_id)
        with self._registry.joining(origin.owner, label, origin.learn, quota) as fork:

            def divide() -> Future[Any] | None:
                self._registry.find(session_id)
                fork.learn = origin.learn
                self._registry.copy_reader(origin, fork)
                return self._persistence.fork(origin, fork) if origin.durable else None

            linked = self._between_tokens(origin, divide)
            if linked is not None:
                linked.result()
                fork.durable = True
        return fork.info()

    def save(self, session_id: str) -> Path:
        """Makes a snapshot of the session now, and returns its file, which a later snapshot replaces."""
        with self._lock:
            store = self._persistence.required
        reader = self._saved(session_id)
        return store.snapshot_path(reader.id)

    def export(self, session_id: str, to: str | None = None) -> Path:
        """Writes the session as it is now to a session file, which stays; returns its path.

        Args:
            to: an address like s3://bucket/name.safetensors (fsspec) for a copy that another engine can `restore`.
        """
        path = (self.directory or Path()) / "exports" / f"{session_id}.safetensors"
        reader = self._saved(session_id)
        self._persistence.export(reader, path).result()
        if to is not None:
            copy_out(path, to)
        return path

    def _saved(self, session_id: str) -> Reader:
        """The session, once there is a snapshot of it as it is now."""
        with self._lock:
            reader, store = self._registry.when_restored(session_id), self._persistence.required
        saved: Future[object] = Future()
        always = not store.has_snapshot(session_id)
        self._between_tokens(reader, lambda: self._persistence.keep(reader, saved.set_result, always=always))
        outcome = saved.result()
        if outcome is not True:
            raise outcome if isinstance(outcome, UserError) else UserError(f"session {session_id} could not be saved")
        return reader

    def restore(self, path: str | Path, owner: str = "", label: str = "", *, quota: Quota | None = None) -> SessionInfo:
        """A new session that goes on from a session file, a path or an address like s3://bucket/name.safetensors.

        Raises:
            UserError: the file is damaged, hostile, no session, or of another model.
            Busy: there is no room for one more.
            OverQuota: the owner may have no more.
        """
        if is_remote(path):
            with tempfile.TemporaryDirectory(dir=self.directory) as folder:
                copied = Path(folder) / "session.safetensors"
                copy_in(str(path), copied)
                return self.restore(copied, owner, label, quota=quota)
        with self._registry.joining(owner, label, True, quota) as reader:
            if self._persistence.store is not None:
                session = self._persistence.take_in(Path(path), reader).result()
            else:
                session = Session.restore(path, self.model, fingerprint=self.fingerprint, device=HOST)
            reader.rest(session.state)
            reader.tier = "host"
            reader.recent.extend(session.recent)
            reader.learn, reader.position = session.learn, session.position
            reader.steps, reader.rolled_back = session.steps, session.rolled_back
            reader.drift, reader.drift_steps = session.drift(), session.steps
            reader.losses = Curve.beginning(session.position)
            reader.durable = self._persistence.store is not None
        return reader.info()

    def delete(self, session_id: str) -> None:
        """Stops what is under way, forgets the session and removes its files; when it returns, they are gone."""
        with self._lock:
            reader = self._registry.find(session_id)
            reader.deleted = True
            for job in list(reader.jobs)[1:]:
                reader.jobs.remove(job)
                job.task._finish(unknown(session_id))
            for job in reader.jobs:
                job.task.cancel()
            if not reader.jobs:
                self._jobs.readers.pop(session_id, None)
            durable, reader.durable = reader.durable, False
            removed = self._persistence.remove(reader) if durable else None
            self._lock.notify()
        if removed is not None:
            removed.result()

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
        self._jobs.check_tokens(tokens)
        tokens = list(tokens)
        digest = None if expected_position is None and key is None else digest_of(tokens)
        return self._submit(
            session_id,
            lambda task, reader: Job(
                task, reader, tokens, expected=expected_position, key=key, digest=digest, wrote=wrote
            ),
        )

    def generate(self, session_id: str, sampling: Sampling) -> Task:
        """Continues the text: events `Token`, result `Finished`. The text is durable when there is a result."""
        return self._submit(session_id, lambda task, reader: Job(task, reader, sampling=sampling))

    def score(
        self,
        session_id: str | None,
        tokens: Sequence[int],
        *,
        learn: bool = True,
        logprobs: int = 0,
        owner: str = "",
    ) -> Task:
        """Reads tokens and forgets them: events and result as of `append`, the session stays as it is.

        Args:
            session_id: None: as if nothing had been read before, learning or not as `learn` says, for `owner`.
            logprobs: how many of the likeliest tokens to report in the place of each (`Progress.top`).
        """
        self._jobs.check_tokens(tokens)
        tokens = list(tokens)
        return self._passing(
            session_id,
            owner,
            learn if session_id is None else None,
            lambda task, reader: Job(task, reader, tokens, logprobs=logprobs),
        )

    def complete(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        session_id: str | None = None,
        learn: bool | None = None,
        owner: str = "",
    ) -> Task:
        """Reads a prompt and continues it, in a session that lives as long as the task.

        Events `Progress` (with `top` where `sampling.logprobs` are asked for), then `Token`; result `Finished`.

        Args:
            session_id: goes on from what this session has read, and leaves it as it is; the prompt may be empty then.
            learn: while reading and writing; None: as the session does, and without one: yes.
            owner: whose share of the device it takes, without a session.
        """
        self._jobs.check_tokens(tokens)
        if not len(tokens) and session_id is None:
            raise UserError("the prompt is empty; give at least one token")
        n, tokens = sampling.logprobs, list(tokens)
        return self._passing(
            session_id, owner, learn, lambda task, reader: Job(task, reader, tokens, sampling=sampling, logprobs=n)
        )

    def _submit(self, session_id: str, make: Callable[[Task, Reader], Job]) -> Task:
        task = Task()
        with self._lock:
            self._jobs.check_waiting()
            self._jobs.submit(make(task, self._registry.find(session_id)))
        return task

    def _passing(
        self, session_id: str | None, owner: str, learn: bool | None, make: Callable[[Task, Reader], Job]
    ) -> Task:
        task = Task()
        with self._lock:
            self._jobs.check_waiting()
            if session_id is None:
                self._pass(make(task, self._jobs.bare(owner, "", learn is not False)))
                return task
            origin = self._registry.find(session_id)

        def start() -> None:
            learns = origin.learn if learn is None else learn
            self._pass(make(task, self._registry.copy_reader(origin, self._jobs.bare(origin.owner, "", learns))))

        def begin() -> None:
            self._registry.find(session_id)
            if (origin.state is not None or origin.lane is not None) and not origin.restoring:
                start()
                return
            # it must come back first: as a task of its own that reads nothing
            visit = Job(Task(), origin, replay=True)
            visit.task.subscribe(lambda outcome: task._finish(outcome) if isinstance(outcome, Exception) else start())
            self._jobs.submit(visit)

        self._between_tokens(origin, begin)
        return task

    def _pass(self, job: Job) -> None:
        """Submits work for a reader that is gone when it is done."""
        job.reader.deleted = True
        self._jobs.readers[job.reader.id] = job.reader
        self._jobs.submit(job)

    # the engine

    def stats(self) -> dict[str, float]:
        """Numbers for monitoring: counts since the start, and how much there is now."""
        with self._lock:
            jobs, store = self._jobs, self._persistence.store
            readers = self._registry.present
            used = jobs.tiers.usage(jobs.readers.values())
            return {
                **jobs.counts,
                "sessions": len(readers),
                **{f"sessions_{tier}": sum(r.tier == tier for r in readers) for tier in ("device", "host", "disk")},
                "bytes_device": used["device"],
                "bytes_host": used["host"],
                "bytes_disk": 0 if store is None else store.nbytes,
                "tasks": self._jobs.tasks,
                "writing": len(jobs.lanes.jobs),
                "restoring": self.restoring,
                "lost": len(self.lost),
                "uptime_seconds": time.time() - self._started,
            }

    def timings(self) -> dict[str, TimeCounts]:
        """How long tasks have waited since the engine started, as histograms of seconds.

        `waiting`: from a task's acceptance to the first computing for it. `first_token`: from its acceptance to its
        first written token, a prompt's reading included. `next_token`: between two tokens of one task. The buckets end
        at `longread.engine.interface.BOUNDS`; counts are not cumulative, and only grow.
        """
        with self._lock:
            return self._jobs.latencies.read()

    def close(self, timeout: float | None = None) -> None:
        """Stops texts at the end of a mini-batch or after a token, saves every session, and ends the thread.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; what has been acknowledged is durable all the same.
        """
        with self._lock:
            if self._jobs.closed:
                return
            self._jobs.closed = True
            stopped = self._scheduler.command(self._stop)
        late = f"the engine is still busy after {timeout} seconds"
        until = None if timeout is None else time.monotonic() + timeout
        try:
            stopped.result(timeout)
        except TimeoutError:
            raise TimeoutError(late) from None
        self._scheduler.stop()
        self._scheduler.join(None if until is None else max(0.0, until - time.monotonic()))
        if self._scheduler.is_alive():
            raise TimeoutError(late)
        self._persistence.close()
        if self._persistence.store is not None:
            self._persistence.store.release()

    def _stop(self) -> None:
        """Ends what can be ended, and lets everything be saved."""
        for reader in self._jobs.readers.values():
            if reader.restoring:  # its events are still there for the next start
                reader.durable = False
            for job in list(reader.jobs):
                if job.replay:
                    reader.jobs.remove(job)
                elif not job.started:
                    reader.jobs.remove(job)
                    job.task._finish(closing())
                job.task.cancel()
            keep = functools.partial(self._persistence.keep, reader, lambda kept: None)
            if reader.jobs:
                reader.afterwards.append(keep)
            else:
                keep()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # at a moment in which nothing happens to a session

    def _between_tokens(self, reader: Reader, work: Callable[[], T]) -> T:
        """What `work` gives, with the lock held; between two tokens, if the session writes in a lane."""
        with self._lock:
            if reader.lane is None:
                return work()
            done = self._scheduler.command(work, reader)
        return done.result()

    def _between_pieces(self, session_id: str, work: Callable[[], T], *, at_once: bool) -> T:
        """What `work` gives, with the lock held; between two pieces or tokens, if there are any and not `at_once`."""
        with self._lock:
            reader = self._registry.find(session_id)
            if at_once or not reader.jobs:
                return work()
            done = self._scheduler.command(work, reader)
        return done.result()
