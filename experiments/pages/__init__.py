"""The pages of the experiments, a module each.

`gather` makes what results.json holds of the results of the jobs in `NEEDS`, `tables` the tables of that alone, and
`plots` the figures. `demo`, `pretrained` and `speculative` have no `gather`: other commands left their figures.
"""

from __future__ import annotations

NAMES = {
    "e2e": "TTT-E2E",
    "swa": "SWA",
    "full": "full attention",
    "hybrid": "hybrid 5 : 1",
    "gdn": "Gated DeltaNet",
    "mamba2": "Mamba 2",
    "kvb": "TTT-KVB",
    "naive": "TTT-naive",
}
KINDS = ("books", "code")
TITLES = {"books": "Held-out books", "code": "Held-out Python"}


def job(method: str, seed: int, length: int) -> str:
    return f"{method}-s{seed}" + (f"-{length}" if length > 1 else "")


def unit_of(kind: str) -> str:
    """Of two panels side by side, the left one names the unit."""
    return "nats per token" if kind == "books" else ""
