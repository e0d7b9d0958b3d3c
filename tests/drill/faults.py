"""The faults of a drill, drawn from a seed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.drill.injection import SLOW, Injection

Damage = Callable[[Path, random.Random], str]


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and how it is started again."""

    name: str
    injections: tuple[Injection, ...] = ()
    by: str = "forks"
    """Who starts ranks: forks or torchrun."""
    again: str = "--resume"
    """Who starts them again after it: torchrun by itself, or a user with --resume."""
    ranks: int = 2
    """That go on."""
    says: str = ""
    """A pattern of what a rank that is left must say."""
    warns: str = ""
    """A pattern of what is said when it is started again."""
    damage: Damage | None = None
    """Done to the run before it is started again; says what."""
    refused: str = ""
    """A pattern of what is said where the damage leaves nothing to go on with; it is undone then."""
    is_read: bool = False
    """Whether checkpoints are read and converted meanwhile."""
    options: tuple[str, ...] = ()
    """More of the command line, of all starts."""
    deadline: int = 30
    """Seconds that ranks wait for one another; what is slow sleeps for two."""
    exact: bool = True
    """Whether the run must be the undisturbed one bit for bit."""

    @property
    def where(self) -> str:
        return "; ".join(str(injection) for injection in self.injections if injection.seconds != SLOW)


class Draw:
    """Draws places that a rank passes through in an undisturbed run."""

    def __init__(self, rng: random.Random, counts: list[dict[str, int]]) -> None:
        self.rng, self.counts = rng, counts

    def __call__(self, act: str, place: str, rank: int | None = None, seconds: float = 0.0) -> Injection:
        rank = self.rng.randrange(2) if rank is None else rank
        count = self.rng.randint(1, self.counts[rank][place])
        after = self.rng.random() < 0.5 or act == "spoil gradient"
        return Injection(act, rank, place, count, after, seconds)


def faults(rng: random.Random, counts: list[dict[str, int]]) -> Iterator[Fault]:
    """All of them; `counts` of an undisturbed run say how often each rank comes to each place."""
    draw = Draw(rng, counts)
    yield from _under_torchrun(draw)
    yield from _killed(draw)
    yield from _late(draw)
    yield from _stopped(draw)
    yield from _refused_by_the_machine(draw)
    yield from _damaged(draw)
    yield from _beside(draw)


def _under_torchrun(draw: Draw) -> Iterator[Fault]:
    def fault(name: str, *injections: Injection, again: str = "torchrun", **options: object) -> Fault:
        return Fault(name, injections, by="torchrun", again=again, **options)  # type: ignore[arg-type]

    yield fault("a rank is killed", draw("kill", "gradient"))
    yield fault("a rank is killed while a checkpoint is written", draw("kill", "disk", rank=0))
    yield fault("all ranks are killed", draw("kill all", "decision"))
    yield fault("a rank is killed twice", draw("kill", "sum"), Injection("kill", 1, "gradient", 2, attempt=1))
    yield fault("all ranks and torchrun are killed", draw("kill all and torchrun", "decision"), again="--resume")
    yield fault("torchrun alone is killed", draw("kill torchrun", "gradient"), again="--resume")
    yield fault("a rank stands still", draw("stop", "gradient", rank=1), says=WAITED, deadline=5)
    yield fault("SIGTERM to a rank", draw("terminate", "gradient"))
    yield fault("SIGTERM to torchrun", draw("terminate torchrun", "gradient"), again="--resume")
    yield fault("Ctrl-C", draw("interrupt all and torchrun", "gradient"), again="--resume")
    yield fault("Ctrl-C while ranks meet", Injection("interrupt all and torchrun", 0, "meeting", 1), again="--resume")
    yield fault(
        "no memory, and nothing takes less", draw("lack memory", "gradient"), options=LEAN, says="out of memory"
    )
    yield fault("a full disk", draw("limit files", "gradient"), says=FULL)
    yield fault("a gradient that is not finite", draw("spoil gradient", "gradient"), says="halted at step")


WAITED = "waited at step .*, for rank"
FULL = r"cannot write \S+(jsonl|step-\d+): File too large;"
LEAN = ("--set", "micro_batch_size=1", "--set", "recompute=step")


def _killed(draw: Draw) -> Iterator[Fault]:
    for place in ("meeting", "gradient", "decision", "decision", "sum", "norm", "gather", "row", "copy"):
        rank = 0 if place == "row" else None
        yield Fault(f"a rank is killed: {place}", (draw("kill", place, rank=rank),), deadline=10)
    for rank in (0, 0, 0, 0, 1, 1):
        yield Fault("a rank is killed: disk", (draw("kill", "disk", rank=rank),))
    for place in ("decision", "disk"):
        yield Fault("all ranks are killed", (draw("kill all", place),))
    for ranks in (1, 4):
        yield Fault(f"a rank is killed, {ranks} go on", (draw("kill", "gradient"),), ranks=ranks, exact=False)


def _late(draw: Draw) -> Iterator[Fault]:
    for rank, place in ((0, "gradient"), (1, "sum"), (0, "disk"), (1, "disk")):
        yield Fault(f"a rank stands still: {place}", (draw("stop", place, rank=rank),), says=WAITED, deadline=5)
    for place in ("gradient", "disk"):
        yield Fault(f"a rank is slow: {place}", (draw("sleep", place, seconds=2.0),), again="")


def _stopped(draw: Draw) -> Iterator[Fault]:
    for place in ("gradient", "decision", "disk"):
        yield Fault(f"SIGTERM to a rank: {place}", (draw("terminate", place),))
    for place in ("gradient", "copy"):
        yield Fault(f"SIGTERM to all: {place}", (draw("terminate all", place),))


def _refused_by_the_machine(draw: Draw) -> Iterator[Fault]:
    for rank in (0, 0, 1):
        yield Fault(
            "a full disk for a moment",
            (draw("fill disk", "disk", rank=rank),),
            says="cannot write .*No space|waited at",
        )
    for rank in (0, 1):
        yield Fault("a full disk", (draw("limit files", "gradient", rank=rank),), says=FULL)
    yield Fault("no memory, and less is taken", (draw("lack memory", "gradient"),), again="", exact=False)
    yield Fault("no memory for the sum", (draw("lack memory", "sum"),), says="out of memory")
    yield Fault("a gradient that is not finite", (draw("spoil gradient", "gradient"),), says="halted at step")


def _damaged(draw: Draw) -> Iterator[Fault]:
    late = Injection("kill all", 0, "gradient", 11)  # two checkpoints are there
    for name, damage in DAMAGES.items():
        back = "" if damage is remove_mark else "going back to step-"
        yield Fault(name, (late,), damage=damage, warns=back)
    refused = "no checkpoint .* can be used"
    yield Fault("a wrong byte in every checkpoint", (late,), damage=flip_everywhere, refused=refused)


def _beside(draw: Draw) -> Iterator[Fault]:
    slow = tuple(Injection("sleep", 0, "gradient", step, seconds=SLOW) for step in range(1, 13))
    yield Fault("checkpoints are read meanwhile", slow, is_read=True, again="")
    yield Fault("a rank is killed, checkpoints are read meanwhile", (*slow, draw("kill", "sum")), is_read=True)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("*/COMMITTED"))[-1].parent


def flip(path: Path, rng: random.Random) -> str:
    """Changes one bit of a file."""
    held = bytearray(path.read_bytes())
    at = rng.randrange(len(held))
    held[at] ^= 1 << rng.randrange(8)
    path.write_bytes(held)
    return f"byte {at} of {path.parent.name}/{path.name}"


def flip_newest(run: Path, rng: random.Random) -> str:
    return flip(rng.choice(sorted(newest(run).iterdir())), rng)


def flip_weights(run: Path, rng: random.Random) -> str:
    return flip(newest(run) / "model.safetensors", rng)


def flip_everywhere(run: Path, rng: random.Random) -> str:
    marks = sorted((run / "checkpoints").glob("*/COMMITTED"))
    return ", ".join(flip(rng.choice(sorted(mark.parent.iterdir())), rng) for mark in marks)


def remove_shard(run: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(newest(run).glob("optimizer-*")))
    path.unlink()
    return f"{path.parent.name}/{path.name} is gone"


def cut_shard(run: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(newest(run).glob("*.safetensors")))
    size = rng.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"{path.parent.name}/{path.name} is cut at {size}"


def exchange_shards(run: Path, rng: random.Random) -> str:
    one, other = sorted(newest(run).glob("optimizer-*"))
    held = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(held)
    return f"{one.name} and {other.name} of {one.parent.name} are exchanged"


def remove_mark(run: Path, rng: random.Random) -> str:
    path = newest(run) / "COMMITTED"
    path.unlink()
    return f"{path.parent.name}/{path.name} is gone"


DAMAGES: dict[str, Damage] = {
    "a wrong byte in the newest checkpoint": flip_newest,
    "a wrong byte in the newest weights": flip_weights,
    "a part is missing": remove_shard,
    "a part is cut": cut_shard,
    "parts are exchanged": exchange_shards,
    "the mark is missing": remove_mark,
}
