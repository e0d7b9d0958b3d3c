"""What lets sessions survive: the engine's thread asks, other threads write and read, and answer when it is done.

Events and snapshots have a thread each, since a snapshot takes seconds and an event must not wait for it.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from longread.config import InnerConfig, UserError
from longread.engine.copies import beside, carried
from longread.engine.curve import Curve
from longread.engine.database import Event
from longread.engine.interface import Busy
from longread.engine.lanes import HOST, Lanes
from longread.engine.records import Job, Reader, Task, Tier
from longread.engine.recovery import Recovered, consistent, replayed
from longread.engine.snapshots import Saved
from longread.engine.store import Begun, Store
from longread.files import atomic_files, make_private, writing
from longread.inner_loop import ReadingState, begin
from longread.model import Transformer
from longread.session import Session

SNAPSHOT_AFTER = 65_536
"""Tokens in events after which a snapshot is made; reading them again is what a start after a crash costs."""

MAKERS = 16
"""Sessions whose files may be made at once; making them waits for the disk."""

Post = Callable[[Callable[[], None]], object]


class Persistence:
    """Sessions and their files. Methods are called with the records' lock held, and call back with it held."""

    def __init__(
        self, model: Transformer, inner: InnerConfig, store: Store | None, lanes: Lanes, mover: Executor, post: Post
    ) -> None:
        self.model, self.inner, self.store = model, inner, store
        self._lanes, self._mover, self._post = lanes, mover, post
        self._writer = ThreadPoolExecutor(1, "longread-events")
        self._makers = ThreadPoolExecutor(MAKERS, "longread-files")
        self._owed: dict[str, list[Event]] = {}  # cuts that the disk did not take; changed in the events' thread
        self.lose: Callable[[Reader, str], None] = lambda reader, reason: None

    def close(self) -> None:
        """Waits for all that is being written. Nobody may ask for more."""
        self._makers.shutdown()
        self._mover.shutdown()
        self._writer.shutdown()

    def _in_background(self, pool: Executor, work: Callable[[], Any], done: Callable[[Any], None]) -> Future[Any]:
        """Runs `work` elsewhere, then `done` here with what it gave, or with the `UserError` it raised."""

        def run() -> Any:
            try:
                found: Any = work()
            except UserError as error:
                found = error
            except Exception as error:
                found = UserError(f"the disk could not be used: {error!r}")
            self._post(lambda: done(found))
            return found

        return pool.submit(run)

    def facts(self, reader: Reader) -> dict[str, Any]:
        """What is known of a session whatever it has read."""
        return {name: getattr(reader, name) for name in ("owner", "label", "learn", "created", "used")}

    def log(self, reader: Reader, events: list[Event], done: Callable[[UserError | None], None]) -> Future[Any]:
        """Makes events durable; `done` hears of an error, after which none of them has happened."""
        store = self.required
        reader.logged += sum(len(event.get("tokens", ())) for event in events)

        def work() -> None:
            store.log(reader.id, self._owed.get(reader.id, []) + events)
            self._owed.pop(reader.id, None)

        return self._in_background(self._writer, work, done)

    def cut(self, reader: Reader, done: Callable[[UserError | None], None]) -> None:
        """Makes durable that the rest of a text was not read; where the disk refuses, with the next event at last.

        Else that event would not go on from where the events end, and would be lost with it after a crash.
        """
        store, event = self.required, {"cut": reader.position}

        def work() -> None:
            try:
                store.log(reader.id, [event])
            except BaseException:
                self._owed[reader.id] = [event]
                raise

        self._in_background(self._writer, work, done)

    def describe(self, reader: Reader) -> Future[Any]:
        """Makes the facts about a reader durable."""
        store, facts = self.required, self.facts(reader)
        return self._writer.submit(lambda: store.describe(reader.id, facts))

    def wants_snapshot(self, reader: Reader) -> bool:
        return reader.durable and not reader.moving and not reader.deleted and reader.logged >= SNAPSHOT_AFTER

    def keep(self, reader: Reader, done: Callable[[Any], None], *, always: bool = False) -> None:
        """Makes a snapshot of a reader as it is now; `done` is told True, False or a `UserError`.

        `always`: even if its files hold everything already.
        """
        if self.store is None or not reader.durable:
            done(False)
            return
        store, job, tokens, held = self.store, reader.job, reader.unlogged, self.store.saved(reader.id)
        unchanged = (held.position, held.learn) == (reader.position, reader.learn) and held.generation > 0
        empty = not reader.position and not held.generation  # its facts are all there is
        if not always and (unchanged or empty) and not reader.logged and not tokens:
            done(True)
            return
        if reader.restoring:
            done(False)
            return
        if job is not None and job.started and not (job.ready or job.closing):
            # its tokens are on their way to the disk: only after that it is known whether they count
            job.once_settled.append(lambda: self.keep(reader, done, always=always))
            return
        state = self.state(reader)
        before: list[Future[Any]] = []
        links = list(reader.links)
        if tokens:
            event = {"at": reader.position - len(tokens), "tokens": tokens, "learn": reader.learn, "wrote": True}
            reader.unlogged = []
            before.append(self.log(reader, [event], lambda error: self._unlog(reader, tokens, error)))
        saved = Saved(
            generation=0,
            position=reader.position,
            steps=reader.steps,
            rolled_back=reader.rolled_back,
            nbytes=reader.nbytes,
            drift=reader.drift,
            learn=reader.learn,
            losses=reader.losses.copy(),
            answers=tuple(reader.answers),
        )
        session = self._session(reader, state)
        logged, moved_on = reader.logged, reader.steps != reader.drift_steps
        begun: Future[Begun] = self._writer.submit(lambda: store.begin(reader.id))
        if job is not None and job.ready and job.reads and not job.replay:
            rest = {"at": reader.position, "tokens": list(job.tokens[job.done :]), "learn": job.learns, "carried": True}
            rest |= {"wrote": True} if job.wrote else {}
            before.append(self.log(reader, [rest], lambda error: None))

        def work() -> bool:
            for written in before:
                if isinstance(written.result(), UserError):
                    raise written.result()
            snapshot = begun.result()
            with beside(self.model.device):
                held = session()
                kept = dataclasses.replace(saved, drift=held.drift()) if moved_on else saved
            held.save(snapshot.path)  # checksums and a disk take seconds
            wait(links)  # forks of what it was before
            # after all changes of its facts that are on their way
            self._writer.submit(lambda: store.commit(reader.id, self.facts(reader), kept, snapshot)).result()
            return True

        def finished(found: Any) -> None:
            if found is True:
                reader.logged = max(0, reader.logged - logged)
            done(found)

        self._in_background(self._mover, work, finished)

    def flush(self, reader: Reader) -> None:
        """Makes what a reader has written so far durable, as written under its present settings."""
        if reader.durable and reader.unlogged:
            tokens, reader.unlogged = reader.unlogged, []
            event = {"at": reader.position - len(tokens), "tokens": tokens, "learn": reader.learn, "wrote": True}
            self.log(reader, [event], lambda error: self._unlog(reader, tokens, error))

    def _unlog(self, reader: Reader, tokens: list[int], error: UserError | None) -> None:
        if error is not None:
            reader.unlogged = tokens + reader.unlogged

    def restored(self, path: Path) -> Session:
        """The session in a file, in the host's memory: bringing it to the device is the tiers' work."""
        return Session.restore(path, self.model, fingerprint=self.required.fingerprint, device=HOST)

    def fetch(self, reader: Reader) -> None:
        """Brings a reader's state back from the disk, into the host's memory."""
        store, reader.moving = self.required, True

        def work() -> Session | None:
            if not store.has_snapshot(reader.id):
                return None
            session = self.restored(store.snapshot_path(reader.id))
            if session.position != store.saved(reader.id).position:
                raise UserError(f"its snapshot is at position {session.position}, not where it should be")
            return session

        def arrived(found: Session | UserError | None) -> None:
            reader.moving = False
            if isinstance(found, UserError):
                self.lose(reader, str(found))
                return
            reader.rest(begin(self.model) if found is None else found.state)
            reader.tier = "device" if found is None else "host"
            if found is not None:
                reader.recent.clear()
                reader.recent.extend(found.recent)

        self._in_background(self._mover, work, arrived)

    def reopen(self, reader: Reader) -> None:
        """Forgets what a reader has in memory: it is again what is durable of it."""
        saved, events = self.required.reopen(reader.id)
        self.adopt(reader, saved, consistent(events + self._owed.get(reader.id, []), saved.position)[0])

    def give_back(self, reader: Reader) -> None:
        """Does what can be done for a reader whose state in memory is gone."""
        reader.state = None
        if reader.durable:
            self.reopen(reader)
        else:
            self.lose(reader, "the device failed, and this engine keeps no files")

    def adopt(self, reader: Reader, saved: Saved, events: Sequence[Event]) -> None:
        """Sets a reader to a snapshot on the disk, and lets it read again what has happened since."""
        reader.state, reader.tier, reader.lane = None, "disk", None
        reader.position, reader.steps, reader.rolled_back = saved.position, saved.steps, saved.rolled_back
        reader.nbytes = saved.nbytes if saved.generation else self._empty_nbytes
        reader.drift, reader.drift_steps = saved.drift, saved.steps
        reader.unlogged, reader.logged = [], 0
        reader.losses = saved.losses.copy()
        reader.answers.clear()
        reader.answers.extend(saved.answers)
        reader.recent.clear()
        for tokens, event in reversed(replayed(events, saved.position)):
            wrote = bool(event.get("wrote"))
            job = Job(Task(), reader, tokens, learn=bool(event["learn"]), replay=True, wrote=wrote)
            if len(tokens) == len(event["tokens"]):
                job.digest, job.key = event.get("digest"), event.get("key")
            job.task.subscribe(lambda outcome: self._replayed(reader, outcome))
            reader.jobs.appendleft(job)
            reader.logged += len(tokens)

    def _replayed(self, reader: Reader, outcome: Any) -> None:
        if isinstance(outcome, BaseException):
            self.lose(reader, f"what it has read since its snapshot could not be read again: {outcome}")

    def create(self, reader: Reader) -> Future[Any]:
        """Makes a new reader durable."""
        store, facts = self.required, self.facts(reader)
        return self._makers.submit(lambda: store.create(reader.id, facts))

    def fork(self, origin: Reader, fork: Reader) -> Future[Any]:
        """Makes a fork durable, without writing what its origin has written."""
        store, facts, tokens = self.required, self.facts(fork), list(origin.unlogged)
        start = origin.position - len(tokens)
        events: list[Event] = [{"cut": start}]
        if tokens:
            events.append({"at": start, "tokens": tokens, "learn": origin.learn, "wrote": True})
        fork.logged = origin.logged
        # the events' thread first: what has been logged is then in the database that is copied
        logged = self._writer.submit(lambda: None)

        def work() -> None:
            logged.result()
            store.link(origin.id, fork.id, facts, events)

        linked = self._makers.submit(work)
        origin.links.add(linked)
        linked.add_done_callback(lambda _: origin.links.discard(linked))
        return linked

    def take_in(self, path: Path, reader: Reader) -> Future[Any]:
        """Makes a copy of a session file the first snapshot of a new reader."""
        store = self.required

        def work() -> Session:
            session = self.restored(path)
            reader.learn, reader.position = session.learn, session.position
            saved = Saved(
                generation=1,
                position=session.position,
                steps=session.steps,
                rolled_back=session.rolled_back,
                nbytes=session.nbytes,
                drift=session.drift(),
                learn=session.learn,
                losses=Curve.beginning(session.position),
            )
            store.create(reader.id, self.facts(reader), saved, snapshot=session.save)
            return session

        return self._makers.submit(work)

    def export(self, reader: Reader, path: Path) -> Future[Any]:
        """Copies the snapshot of a reader to `path`; gives the path."""
        store = self.required

        def work() -> Path:
            with writing(path):
                make_private(path.parent)
            with atomic_files(path, private=True) as (temporary,):
                shutil.copyfile(store.snapshot_path(reader.id), temporary)
            return path

        return self._mover.submit(work)

    def remove(self, reader: Reader) -> Future[Any]:
        """Deletes a reader's files, after all that is still being written to them or made from them."""
        store, links = self.required, list(reader.links)
        logged = self._writer.submit(lambda: self._owed.pop(reader.id, None))

        def work() -> None:
            wait([logged, *links])
            store.remove(reader.id)

        return self._mover.submit(work)

    def check_room(self, largest: int = 0, limit: int | None = None) -> None:
        """Raises `Busy` where the files of one more session would be too much."""
        if self.store is not None and limit is not None and self.store.nbytes + largest > limit:
            raise Busy(
                f"session files take {self.store.nbytes} bytes of {limit}; delete a session, or try again later", 30
            )

    def state(self, reader: Reader) -> ReadingState | None:
        """The state of a reader, wherever in memory it is."""
        return self.state_and_tier(reader)[0]

    def state_and_tier(self, reader: Reader) -> tuple[ReadingState | None, Tier]:
        """And where that is; from a lane it comes as a copy, on the device if there is room."""
        job = reader.job
        if reader.lane is not None and job is not None:
            return self._lanes.state_somewhere(job)
        return reader.state, reader.tier

    def _session(self, reader: Reader, state: ReadingState | None) -> Callable[[], Session]:
        """What makes the session of a reader as it is now, to be saved; for another thread."""
        store, learn, steps, rolled_back = self.required, reader.learn, reader.steps, reader.rolled_back
        recent = tuple(reader.recent)

        def make() -> Session:
            if state is None and store.has_snapshot(reader.id):
                session = self.restored(store.snapshot_path(reader.id))
                session.learn = learn
                return session
            return Session.resume(
                self.model,
                self.inner,
                carried(begin(self.model) if state is None else state, HOST),
                learn=learn,
                recent=recent,
                steps=steps,
                rolled_back=rolled_back,
                fingerprint=store.fingerprint,
            )

        return make

    @functools.cached_property
    def _empty_nbytes(self) -> int:
        """Of a session that has read nothing."""
        return begin(self.model).nbytes

    @property
    def required(self) -> Store:
        """The files. Raises `UserError` for an engine without a directory."""
        if self.store is None:
            raise UserError("this engine keeps no files; give it a directory")
        return self.store


def recovered(found: Recovered, window: int) -> Reader:
    """The reader of a session that was found on the disk."""
    facts = found.facts
    return Reader(
        id=found.id,
        owner=str(facts["owner"]),
        label=str(facts["label"]),
        learn=bool(facts["learn"]),
        recent=deque(maxlen=window),
        durable=True,
        created=float(facts["created"]),
        used=float(facts["used"]),
    )
