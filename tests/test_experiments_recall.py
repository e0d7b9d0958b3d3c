"""The page about recall: what is counted as inside the window, and which prompts are compared with which."""

from __future__ import annotations

from typing import Any

import pytest
from experiments.pages import recall
from experiments.results import Results

from longread.config import ModelConfig
from tests import tiny


def trial(context: int, inside: bool, found: bool, nats: float, variant: str = "S-NIAH-2") -> dict[str, Any]:
    return {
        "variant": variant,
        "context_length": context,
        "inside_window": inside,
        "found": found,
        "value_nats": nats,
        "diverged_at": None,
    }


def searches(**trials: list[dict[str, Any]]) -> dict[str, Any]:
    return {"results": [{"reading": reading, "trials": made} for reading, made in trials.items()]}


@pytest.fixture
def tables() -> dict[str, dict[str, list[str]]]:
    """By caption and first cells; the base finds two of six beyond the window, an attempt four."""
    near = trial(512, True, True, 1.0)
    base = [near, *(trial(4096, False, i < 2, 10.0) for i in range(6))]
    attempt = [near, *(trial(4096, False, i >= 2, 4.0 + i % 2) for i in range(6))]
    frozen = [near, *(trial(4096, False, False, 12.0) for _ in range(6)), trial(8192, False, True, 0.0)]
    found = Results()
    found.evaluations = {
        "needle-first-order": {
            "question": searches(learning=base, frozen=frozen),
            "verbatim": searches(learning=[trial(4096, False, False, 6.0)]),
        },
        "recall-30": {"question": searches(learning=attempt)},
        "needle-swa": {"question": searches(static=[near])},
    }
    made = {}
    for table in recall.tables(recall.gather(found)):
        made[table.caption] = {" ".join(row[:2]): list(row) for row in table.rows}
        assert all(len(row) == len(table.head) for row in table.rows)
    return made


def test_needles_are_counted_inside_and_beyond_the_window(tables: dict[str, dict[str, list[str]]]) -> None:
    rows = {row[0]: row[1:] for row in tables[next(c for c in tables if c.startswith("S-NIAH-2, needles"))].values()}
    assert rows["reader, learning"] == ["1 of 1", "2 of 6", ""]
    assert rows["reader, frozen"] == ["1 of 1", "0 of 6", "1 of 1"]
    assert rows["reader, facts 30 %, learning"] == ["1 of 1", "4 of 6", ""]
    assert rows["SWA twin"] == ["1 of 1", "", ""]


def test_storage_is_what_the_verbatim_probe_costs(tables: dict[str, dict[str, list[str]]]) -> None:
    (row,) = tables[recall._ORACLES].values()
    assert row[4:7] == ["1.0", "10.0", "6.0"]


def test_what_got_through_is_counted_from_a_guess_that_knows_the_form(tables: dict[str, dict[str, list[str]]]) -> None:
    rows = tables[recall._INFORMED]
    assert rows["reader, learning "][1:] == ["", "+6.0 ± 0.0", ""]  # ln(9 · 10^6) is 16.0
    assert rows["reader, facts 30 %, learning "][2] == "+11.5 ± 0.6"


def test_pairs_are_the_prompts_that_both_have_read(tables: dict[str, dict[str, list[str]]]) -> None:
    pairs = tables[recall._PAIRS]
    assert pairs["reader: learning, frozen S-NIAH-2, beyond"][2:] == ["6", "2", "0", "0.5", "+2.0 ± 0.0"]
    assert pairs["reader, facts 30 %, reader: both learning S-NIAH-2, beyond"][2:6] == ["6", "4", "2", "0.69"]
    assert pairs["reader, facts 30 %, reader: both learning S-NIAH-2, beyond"][6].startswith("+5.5 ± 0.")
    assert pairs["reader: learning, frozen S-NIAH-2, inside"][2:6] == ["1", "0", "0", "1"]
    assert len(pairs) == 3


def test_a_session_grows_by_blocks_without_a_window() -> None:
    assert recall.bytes_a_token(tiny.config()) == 0
    hybrid = ModelConfig.from_dict(tiny.config(num_blocks=12).as_dict() | {"attention": "hybrid"})
    assert recall.bytes_a_token(hybrid) == 2 * 2 * hybrid.kv_width * 2
    assert recall.bytes_a_token(tiny.config(attention="full")) == 4 * 2 * 16 * 2
