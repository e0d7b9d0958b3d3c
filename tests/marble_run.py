"""The marble run once more, as slow Python over lists and dictionaries: the oracle of longread.thinking.world."""

from __future__ import annotations

from collections.abc import Sequence

NAMES = {0: "empty", 1: "floor", 2: "wedge", 3: "wall", 4: "key", 5: "sealed goal", 6: "open goal"}


def trial(
    cells: Sequence[int], plan: Sequence[int], families: Sequence[Sequence[int]], columns: int = 5
) -> tuple[list[int], bool]:
    """Drops the marbles of a plan one after the other: the last cell of each, and whether one reached the open goal."""
    board = [NAMES.get(kind, f"curtain {kind - 7}") for kind in cells]
    lasts, won = [], False
    for number, column in enumerate(plan):
        row, tint = 0, number
        while True:
            place = row * columns + column
            here = board[place]
            if here == "empty":
                row += 1
            elif here.startswith("curtain"):
                tint = families[int(here.split()[1])][tint]
                row += 1
            elif here == "wedge":
                row += 1
                column = (column + tint - columns // 2) % columns
            else:
                break
        if here == "key":
            board = [{"key": "floor", "sealed goal": "open goal"}.get(kind, kind) for kind in board]
        won = won or here == "open goal"
        lasts.append(place)
    return lasts, won


def winning(cells: Sequence[int], families: Sequence[Sequence[int]], columns: int = 5) -> list[tuple[int, int]]:
    """Every plan that wins, by trying all."""
    plans = [(a, b) for a in range(columns) for b in range(columns)]
    return [plan for plan in plans if trial(cells, plan, families, columns)[1]]
