"""Several processes that train one model, as `torchrun` starts them; one process alone is the identity.

launch          the place of a process among those that were started together
meeting         where the ranks of one start find each other
world           who takes part, what they decide together, and who is late
failure         errors that ranks have of one another
rows            parameters whose rows are divided: gradients come together, new values go round
fully_sharded   parameters of which each rank holds its rows alone (FSDP2)
state           neighbours that read the same sequences and divide the hidden units of the fast MLPs
"""

from __future__ import annotations

from longread.parallel.failure import RankFailed, agreed, is_agreed
from longread.parallel.fully_sharded import FullySharded, fill_rows, is_divided, whole_tensors
from longread.parallel.launch import Launch
from longread.parallel.rows import DividedRows
from longread.parallel.state import divide_state
from longread.parallel.world import ALONE, DEADLINE, World, joined

__all__ = [
    "ALONE",
    "DEADLINE",
    "DividedRows",
    "FullySharded",
    "Launch",
    "RankFailed",
    "World",
    "agreed",
    "divide_state",
    "fill_rows",
    "is_agreed",
    "is_divided",
    "joined",
    "whole_tensors",
]
