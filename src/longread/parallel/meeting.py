"""Where the ranks of one start meet: a part of torchrun's store into which no earlier start has written.

torchrun keeps one store over all its restarts, and what dead processes wrote into it: PyTorch would look for them there
(https://github.com/pytorch/pytorch/issues/135712). Its count of restarts tells no starts apart, since each machine has
its own. So ranks find each other by names that they draw: rank 0 draws one for the start, and tells it to whoever asks
in a name of its own. It asks for those that have not confirmed again and again, as it may have found an old question.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from longread.parallel.failure import RankFailed, first_sentence

_PLACE = "longread/meeting"
_PAUSE = 0.01
"""Seconds."""


def meeting_store(rank: int, size: int, deadline: float) -> Store:
    """The store of this start, for `torch.distributed.init_process_group`. All ranks call it together.

    The environment says where torchrun's is. Raises `RankFailed` if some have not come within `deadline` seconds; on
    rank 0 it names them.
    """
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timedelta(seconds=deadline))))
        name = _gather(store, size, deadline) if rank == 0 else _ask(store, rank)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, RankFailed):
            raise
        raise RankFailed(
            f"rank {rank} waited {deadline:g} seconds for rank 0 to begin: {first_sentence(str(error))}; "
            "start all ranks again"
        ) from error
    return PrefixStore(name, store)


def _ask(store: Store, rank: int) -> str:
    own = uuid.uuid4().hex
    store.set(f"{_PLACE}/question/{rank}", own)
    name = store.get(f"{_PLACE}/answer/{own}").decode()
    store.set(f"{_PLACE}/{name}/{rank}", "here")
    return str(name)


def _gather(store: Store, size: int, deadline: float) -> str:
    name, end = uuid.uuid4().hex, time.monotonic() + deadline
    missing, answered = set(range(1, size)), set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"{_PLACE}/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([question := f"{_PLACE}/question/{rank}"]):
                asks = store.get(question).decode()
                if asks not in answered:
                    store.set(f"{_PLACE}/answer/{asks}", name)
                    answered.add(asks)
        if missing and time.monotonic() > end:
            some = ", ".join(map(str, sorted(missing)[:8])) + (", ..." if len(missing) > 8 else "")
            raise RankFailed(f"rank 0 waited {deadline:g} seconds for ranks {some} to begin; start all ranks again")
        if missing:
            time.sleep(_PAUSE)
    return name
