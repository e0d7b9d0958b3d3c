"""Why faults may survive: `survivors.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

Reasons = dict[str, dict[str, dict[str, str]]]  # file, function, "before => after"; `*` stands for all of a function


def known_reasons() -> Reasons:
    """All that are written down."""
    return tomllib.loads((Path(__file__).parent / "survivors.toml").read_text())


def reason_of(reasons: Reasons, fault: dict[str, Any]) -> tuple[str, str]:
    """The name under which a fault has a reason, and the reason; both empty where there is none."""
    given = reasons.get(fault["file"], {}).get(fault["function"], {})
    for name in (f"{fault['before']} => {fault['after']}", "*"):
        if name in given:
            return name, given[name]
    return "", ""
