"""Errors that ranks have of one another."""

from __future__ import annotations

import re
from typing import TypeVar

import torch.distributed as dist

from longread.config import UserError

_AGREED = "all ranks know it"
E = TypeVar("E", bound=BaseException)


class RankFailed(UserError):
    """Another rank failed or did not come; the message names it."""

    is_said_elsewhere = False
    """By the rank that failed, at more length."""


def agreed(error: E) -> E:
    """Marks an error that all ranks raise or know of: a `World.together` around it asks nobody again."""
    vars(error)[_AGREED] = True
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether `agreed` has marked it."""
    return _AGREED in vars(error)


def is_of_peers(error: BaseException) -> bool:
    """Whether PyTorch says that another rank is late or gone. Gloo and NCCL say it in errors of no class of its own."""
    return isinstance(error, dist.DistError) or bool(re.search("gloo|nccl", str(error), re.IGNORECASE))


def first_sentence(reason: str) -> str:
    """Of what PyTorch says of a peer: without its place in the source, keys of a store, and advice."""
    return reason.partition("\n")[0].rpartition("] ")[2].partition(". ")[0].partition(", keys: ")[0][:160]
