"""Many sessions on one device: they read and write at once, and none can tell.

engine.py       what any thread may call
interface.py    limits, facts, events, times and errors
records.py      what is known of sessions and of the work for them, and the lock over it
scheduler.py    the thread that computes: who comes next, and what is computed at a time
pieces.py       a piece of text, read by a group of sessions
jobs.py         a piece of work from its acceptance to its end; shares of owners, times of clients
registry.py     which sessions there are, which are just being made, and whether there is room for more
lanes.py        sessions that write, a token of all of them at a time, or one by one where a batch must change no bit
memory.py       who is on the device, in the host's memory or on the disk, and how many fit
copies.py       states on their way between a GPU and the host's memory
persistence.py  what lets sessions survive: events and snapshots, written in threads of their own
store.py        the directory: a database and a snapshot for each session
database.py     a session's database: checked rows, durable when they are written
log_check.py    whether SQLite's write-ahead log is damaged
snapshots.py    session files: snapshots, what they hold beside the session, copies on a shared storage
recovery.py     what is found at the start, also as it was kept before there were databases, and what is lost
curve.py        mean losses of a session, by position
"""

from longread.engine.curve import Curve
from longread.engine.engine import Engine
from longread.engine.interface import (
    Appended,
    Busy,
    Finished,
    Limits,
    Lost,
    OverQuota,
    Progress,
    Quota,
    SessionInfo,
    TimeCounts,
    Token,
    TooLarge,
    TopTokens,
    UnknownSession,
    WrongPosition,
)
from longread.engine.lanes import largest_session
from longread.engine.memory import Capacity, SessionBytes, capacity, least_device_bytes, session_sizes
from longread.engine.records import Task
from longread.session.sampling import Sampling

__all__ = [
    "Appended",
    "Busy",
    "Capacity",
    "Curve",
    "Engine",
    "Finished",
    "Limits",
    "Lost",
    "OverQuota",
    "Progress",
    "Quota",
    "Sampling",
    "SessionBytes",
    "SessionInfo",
    "Task",
    "TimeCounts",
    "Token",
    "TooLarge",
    "TopTokens",
    "UnknownSession",
    "WrongPosition",
    "capacity",
    "largest_session",
    "least_device_bytes",
    "session_sizes",
]
