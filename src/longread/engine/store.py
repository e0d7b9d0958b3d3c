"""The files of an engine's sessions, from which it goes on after any end, `kill -9` included.

    <directory>/<id>/session.json             who it belongs to, and which snapshot counts
    <directory>/<id>/snapshot-<n>.safetensors  a session file, as `longread.session.Session.save` writes it
    <directory>/<id>/journal-<n>.jsonl         what has happened since snapshot n
    <directory>/lock                           locked as long as somebody uses the directory

A snapshot counts from the moment in which `session.json` names it; the files before it are removed after that. What
happens while a snapshot is written goes into the journal of the new one, so no moment loses anything. A session that
has no snapshot yet begins with its journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.engine.curve import Curve
from longread.engine.interface import Appended, Lost
from longread.engine.journal import DamagedJournal, Event, add_events, reached, read_events
from longread.engine.reader import Answer
from longread.extras import install_command
from longread.files import (
    close_to_others,
    make_durable,
    make_private,
    owner_only,
    read_json,
    remove_temporaries,
    remove_tree,
    write_json_atomically,
    writing,
)

KIND = "engine-session"
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a snapshot holds beside the session's file."""

    generation: int = 0
    position: int = 0
    steps: int = 0
    rolled_back: int = 0
    nbytes: int = 0
    drift: float = 0.0
    learn: bool | None = None
    losses: Curve = field(default_factory=Curve)
    answers: tuple[Answer, ...] = ()


@dataclass
class Recovered:
    """One session as it was found."""

    id: str
    facts: dict[str, Any]
    saved: Saved
    events: list[Event]


@dataclass
class _Files:
    saved: Saved
    journal: int
    """That events go into now."""
    nbytes: int = 0
    named: int = -1
    """The journal whose name in the folder is known to be durable."""


@dataclass
class Store:
    """One directory, which belongs to this store alone. Its methods may be called from any thread.

    The lock is the operating system's, on an open file: it ends with `release` or with the process, however that ends,
    and leaves nothing to clean up.

    Raises:
        UserError: another store, of this process or of another, uses the directory; or it cannot be used at all.
    """

    directory: Path
    fingerprint: str
    lost: list[Lost] = field(default_factory=list)
    _files: dict[str, _Files] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _claim: int | None = None
    """Descriptor of the locked file."""

    def __post_init__(self) -> None:
        try:
            make_private(self.directory)
            claim = owner_only(self.directory / "lock", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(claim)
                raise
        except BlockingIOError:
            raise UserError(
                f"{self.directory} is in use by another server; stop that one, or give another directory"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot keep sessions in {self.directory}: {error.strerror}; give another directory"
            ) from None
        self._claim = claim

    def release(self) -> None:
        """Lets others use the directory. Nothing may be called after this."""
        claim, self._claim = self._claim, None
        if claim is not None:
            os.close(claim)

    @property
    def nbytes(self) -> int:
        """Bytes of all files of all sessions."""
        return sum(files.nbytes for files in self._files.values())

    def folder(self, session_id: str) -> Path:
        """Where a session's files are."""
        return self.directory / session_id

    def snapshot_path(self, session_id: str, generation: int | None = None) -> Path:
        """The session file of a snapshot, the one that counts if None."""
        n = self._files[session_id].saved.generation if generation is None else generation
        return self.folder(session_id) / f"snapshot-{n}.safetensors"

    def has_snapshot(self, session_id: str) -> bool:
        """Whether there is a session file; a new session has none."""
        return self._files[session_id].saved.generation > 0

    def saved(self, session_id: str) -> Saved:
        """What the snapshot that counts holds."""
        return self._files[session_id].saved

    def create(self, session_id: str, facts: Mapping[str, Any], saved: Saved | None = None) -> None:
        """Makes the folder of a new session."""
        saved = saved or Saved()
        with writing(self.folder(session_id)):
            make_private(self.folder(session_id))
            make_durable(self.directory)
        self._write_facts(session_id, facts, saved)
        self._files[session_id] = _Files(saved, saved.generation)
        self._weigh(session_id)

    def describe(self, session_id: str, facts: Mapping[str, Any]) -> None:
        """Replaces the facts of a session; its snapshot stays."""
        self._write_facts(session_id, facts, self._files[session_id].saved)

    def log(self, session_id: str, events: list[Event]) -> None:
        """Makes events durable. After a `UserError` none of them has happened."""
        with self._lock:
            files = self._files[session_id]
            number = files.journal
        path = self.folder(session_id) / f"journal-{number}.jsonl"
        if files.named != number:  # before the events, which could not be taken back if this failed
            with writing(path):
                os.close(owner_only(path, os.O_WRONLY | os.O_CREAT))
                make_durable(self.folder(session_id))
            files.named = number
        files.nbytes += add_events(path, events)

    def turn(self, session_id: str) -> int:
        """Begins the journal of the next snapshot; returns its number."""
        with self._lock:
            self._files[session_id].journal += 1
            return self._files[session_id].journal

    def commit(self, session_id: str, facts: Mapping[str, Any], saved: Saved, generation: int) -> None:
        """Lets a snapshot that has been written count, and removes what is older."""
        saved = dataclasses.replace(saved, generation=generation)
        self._write_facts(session_id, facts, saved)
        self._files[session_id].saved = saved
        self._files[session_id].journal = max(self._files[session_id].journal, generation)
        for kind in ("snapshot", "journal"):
            for number, path in self._numbered(session_id, kind):
                if number < saved.generation:
                    remove_tree(path)
        self._weigh(session_id)

    def link(self, origin: str, session_id: str, facts: Mapping[str, Any], events: list[Event]) -> None:
        """Makes the files of a fork: those of `origin`, which take no further room, and `events` after them."""
        saved = self._files[origin].saved
        with writing(self.folder(session_id)):
            make_private(self.folder(session_id))
            if saved.generation:
                path = self.snapshot_path(origin)
                try:
                    os.link(path, self.folder(session_id) / path.name)
                except OSError:
                    _copy(path, self.folder(session_id) / path.name)
            older = self._events(origin, saved)
        try:
            add_events(self.folder(session_id) / f"journal-{saved.generation}.jsonl", older + events)
            self.create(session_id, facts, saved)
        except UserError:
            self.remove(session_id)
            raise

    def reopen(self, session_id: str) -> tuple[Saved, list[Event]]:
        """What is durable of a session now."""
        saved = self._files[session_id].saved
        return saved, self._events(session_id, saved)

    def _events(self, session_id: str, saved: Saved) -> list[Event]:
        journals = [path for number, path in self._numbered(session_id, "journal") if number >= saved.generation]
        return [event for path in journals for event in read_events(path)]

    def remove(self, session_id: str) -> None:
        """Deletes a session's files."""
        self._files.pop(session_id, None)
        folder = self.folder(session_id)
        with writing(folder):
            (folder / "session.json").unlink(missing_ok=True)  # first: what is left half-way is no session
            try:
                if folder.exists():
                    make_durable(folder)
            finally:
                remove_tree(folder)

    def recover(self) -> list[Recovered]:
        """All sessions that can go on; `lost` says what cannot.

        Raises `UserError`, and changes nothing, if any session belongs to another model.
        """
        found = []
        self._refuse_other_models()
        for folder in sorted(self.directory.iterdir()):
            if not _ID.match(folder.name) or not folder.is_dir() or folder.is_symlink():
                continue
            for path in (folder, *folder.iterdir()):  # lost ones too; a copy may have left them open
                close_to_others(path)
            if _ID.fullmatch(folder.name):
                remove_temporaries(folder)
                if not (folder / "session.json").exists():
                    remove_tree(folder)  # its creation or deletion was never finished
                    continue
                recovered = self._recover(folder.name)
                if recovered is not None:
                    found.append(recovered)
        return found

    def _refuse_other_models(self) -> None:
        """They are not damaged: the model that read them can go on with them."""
        folders = [folder for folder in self.directory.iterdir() if _ID.fullmatch(folder.name)]
        foreign = 0
        for folder in folders:
            with contextlib.suppress(UserError):  # what is damaged is told of later
                found = read_json(folder / "session.json", kind=KIND).get("fingerprint")
                foreign += isinstance(found, str) and found != self.fingerprint
        if foreign:
            raise UserError(
                f"{foreign} of {len(folders)} sessions in {self.directory} belong to another model; "
                "start with the model that read them, or give another directory"
            )

    def give_up(self, session_id: str, owner: str, position: int, reason: str, restored: int = 0) -> None:
        """Reports what is lost; the files stay for whoever can repair them, but under another name if all is lost."""
        self.lost.append(Lost(session_id, owner, position, restored, reason))
        if not restored:
            self._files.pop(session_id, None)
            self.folder(session_id).rename(self.folder(session_id).with_name(f"{session_id}.lost"))

    def _recover(self, session_id: str) -> Recovered | None:
        owner, position = "", 0
        try:
            values = read_json(self.folder(session_id) / "session.json", kind=KIND)
            facts, saved = values["facts"], _saved(values["saved"])
            owner, position = str(facts["owner"]), saved.position
            self._files[session_id] = _Files(saved, saved.generation)
            if saved.generation:
                _check_whole(self.snapshot_path(session_id))
        except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error) if isinstance(error, UserError) else f"session.json is damaged: {error!r}"
            for _, path in self._numbered(session_id, "journal"):
                position = max(position, reached(path))
            self.give_up(session_id, owner, position, reason)
            return None
        events, damage = [], None
        for number, path in self._numbered(session_id, "journal"):
            self._files[session_id].journal = max(self._files[session_id].journal, number)
            if number >= saved.generation and damage is None:
                try:
                    events += read_events(path)
                except DamagedJournal as error:
                    events, damage = events + error.events, str(error)
        good, end = consistent(events, saved.position)
        if damage is None and len(good) < len(events):
            damage = f"its journal does not go on at {end}"
        self._files[session_id].journal += 1  # nothing is added to one whose last line may be cut off
        if damage is not None:
            journals = [path for _, path in self._numbered(session_id, "journal")]
            self.lost.append(Lost(session_id, owner, max([end, *map(reached, journals)]), end, damage))
            add_events(self.folder(session_id) / f"journal-{self._files[session_id].journal}.jsonl", good)
            for path in journals:
                path.rename(path.with_name(f"{path.name}.damaged"))
        self._weigh(session_id)
        return Recovered(session_id, facts, saved, good)

    def _numbered(self, session_id: str, kind: str) -> list[tuple[int, Path]]:
        paths = self.folder(session_id).glob(f"{kind}-*")
        return sorted((int(match[1]), p) for p in paths if (match := re.fullmatch(rf"{kind}-(\d+)\.\w+", p.name)))

    def _write_facts(self, session_id: str, facts: Mapping[str, Any], saved: Saved) -> None:
        values = {"fingerprint": self.fingerprint, "facts": dict(facts), "saved": _plain(saved)}
        write_json_atomically(self.folder(session_id) / "session.json", values, kind=KIND, private=True)

    def _weigh(self, session_id: str) -> None:
        files = self._files.get(session_id)
        if files is not None:
            files.nbytes = sum(path.stat().st_size for path in self.folder(session_id).iterdir() if path.is_file())


def is_remote(path: str | Path) -> bool:
    """Whether this is an address like s3://bucket/session.safetensors and no path of this machine."""
    return "://" in str(path)


def copy_out(path: Path, url: str) -> None:
    """Copies a file to a shared storage. Raises `UserError` with the reason where it cannot be written."""
    filesystem, there = _storage(url)
    try:
        filesystem.put_file(str(path), there)
    except Exception as error:
        raise UserError(f"cannot write {url}: {error}") from None


def copy_in(url: str, path: Path) -> None:
    """Copies a file from a shared storage. Raises `UserError` with the reason where it cannot be read."""
    filesystem, there = _storage(url)
    os.close(owner_only(path, os.O_WRONLY | os.O_CREAT))
    try:
        filesystem.get_file(there, str(path))
    except Exception as error:
        raise UserError(f"cannot read {url}: {error}") from None


def _storage(url: str) -> tuple[Any, str]:
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(f"{url} needs fsspec; run {install_command('fsspec')}") from None
    try:
        filesystem, there = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url} cannot be used: {error}") from None
    return filesystem, there


def consistent(events: list[Event], position: int) -> tuple[list[Event], int]:
    """The events, from the first, that lead on from `position` without a gap, and the position that they lead to."""
    good = []
    for event in events:
        try:
            if "cut" in event:
                position = min(position, int(event["cut"]))
            elif not all(type(token) is int and token >= 0 for token in event["tokens"]):
                break
            elif event["at"] != position:
                # the rest of a text, said again for a snapshot that then was not made
                if not (event.get("carried") and event["at"] + len(event["tokens"]) <= position):
                    break
            else:
                position += len(event["tokens"])
        except (KeyError, TypeError, ValueError):
            break
        good.append(event)
    return good, position


def _copy(path: Path, copy: Path) -> None:
    with path.open("rb") as file, open(copy, "wb", opener=owner_only) as new:
        shutil.copyfileobj(file, new)
    make_durable(copy)


def _check_whole(path: Path) -> None:
    """Refuses a snapshot that is missing or cut off; its contents are checked when the session is wanted."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            text = file.read(min(header, size))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    ends = [int(end) for end in re.findall(rb'"data_offsets":\s*\[\d+,\s*(\d+)\]', text)]
    if size < 8 or len(text) < header or size != 8 + header + max(ends, default=0):
        raise UserError(f"{path} is truncated: {size} bytes are not all of it; restore it from a copy")


def _plain(saved: Saved) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    values = dataclasses.asdict(saved) | {"losses": saved.losses.as_json()}
    for answer in values["answers"]:
        answer["result"]["nll"] = [None if math.isnan(x) else x for x in answer["result"]["nll"]]
    return values


def _saved(values: dict[str, Any]) -> Saved:
    answers = []
    for answer in values["answers"]:
        result = dict(answer["result"])
        result["nll"] = [math.nan if x is None else float(x) for x in result["nll"]]
        answers.append(Answer(answer["start"], answer["digest"], answer["key"], Appended(**result)))
    numbers = {name: int(values[name]) for name in ("generation", "position", "steps", "rolled_back", "nbytes")}
    losses = Curve.from_json(values["losses"]) if "losses" in values else Curve.beginning(numbers["position"])
    return Saved(**numbers, drift=float(values["drift"]), learn=values["learn"], losses=losses, answers=tuple(answers))
