"""Several processes that train one model, as `torchrun` starts them; one process alone is the identity.

world   who takes part, what they decide together, and who is late
state   neighbours that read the same sequences and divide the hidden units of the fast MLPs
rows    parameters whose rows are divided: gradients come together, new values go round
"""

from __future__ import annotations

from longread.parallel.rows import DividedRows
from longread.parallel.state import Place, divide_state
from longread.parallel.world import ALONE, DEADLINE, Launch, RankFailed, World, agreed, joined

__all__ = [
    "ALONE",
    "DEADLINE",
    "DividedRows",
    "Launch",
    "Place",
    "RankFailed",
    "World",
    "agreed",
    "divide_state",
    "joined",
]
