"""Several processes that train one model, as `torchrun` starts them; one process alone is the identity.

world   who takes part, what they decide together, and who is late
rows    parameters whose rows are divided: gradients come together, new values go round
"""

from __future__ import annotations

from longread.parallel.rows import DividedRows
from longread.parallel.world import ALONE, DEADLINE, Launch, RankFailed, World, joined

__all__ = ["ALONE", "DEADLINE", "DividedRows", "Launch", "RankFailed", "World", "joined"]
