"""The world of thinking agents, its rules and its boards, against a slow simulator; which boards are withheld."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from longread.config import UserError
from longread.thinking import MarbleWorld, WorldConfig, certified_set
from longread.thinking.draws import Draws, choose
from longread.thinking.tasks import coverage, draw_legal, families_on, is_legal, mutate_legal, random_play, rule
from longread.thinking.trials import Played, outcomes, play
from longread.thinking.world import CURTAIN, EMPTY, FLOOR, KEY, OPEN, SEALED, WALL, WEDGE, permutations
from tests.marble_run import trial, winning

WORLD = MarbleWorld(WorldConfig())
RICH = MarbleWorld(WorldConfig(curtain_rows=4, empty_chance=0.6, permutation_seed=3))
A, B, C, D = range(CURTAIN, CURTAIN + 4)
PLANS = list(itertools.product(range(5), repeat=2))
each_world = pytest.mark.parametrize("world", [WORLD, RICH], ids=["uniform", "rich"])


def board(*rows: str) -> Tensor:
    """Cells from a drawing: . empty, a to d curtains, v wedge, # wall, _ floor, k key, g goal, G open goal."""
    kinds = {".": EMPTY, "_": FLOOR, "v": WEDGE, "#": WALL, "k": KEY, "g": SEALED, "G": OPEN}
    kinds |= {letter: CURTAIN + i for i, letter in enumerate("abcd")}
    return torch.tensor([kinds[cell] for row in rows for cell in row])


def at(row: int, column: int, tint: int) -> Tensor:
    return torch.tensor((row * 5 + column) * 5 + tint)


BOARD = board("abcd.", ".....", "#....", ".....", "vvvvv", "k_g_G")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (at(1, 2, 3), at(2, 2, 3)),  # empty
        (at(0, 0, 0), at(1, 0, 4)),  # families a to d, each from its row of the table
        (at(0, 1, 4), at(1, 1, 2)),
        (at(0, 2, 1), at(1, 2, 4)),
        (at(0, 3, 2), at(1, 3, 3)),
        (at(4, 1, 2), at(5, 1, 2)),  # wedges move by tint − 2
        (at(4, 1, 4), at(5, 3, 4)),
        (at(4, 0, 0), at(5, 3, 0)),  # round the edge, both ways
        (at(4, 4, 3), at(5, 0, 3)),
        (at(2, 0, 1), torch.tensor(150)),  # wall, floor, sealed goal
        (at(5, 1, 1), torch.tensor(150)),
        (at(5, 2, 1), torch.tensor(150)),
        (torch.tensor(150), torch.tensor(150)),
    ],
)
def test_what_a_cell_does_to_a_marble(before: Tensor, after: Tensor) -> None:
    cells, marble, success = WORLD.step(BOARD, before)
    assert marble == after
    assert torch.equal(cells, BOARD)
    assert not success


def test_the_key_opens_the_goal_and_the_open_goal_is_success() -> None:
    cells, marble, success = WORLD.step(BOARD, at(5, 0, 1))
    assert torch.equal(cells, board("abcd.", ".....", "#....", ".....", "vvvvv", "__G_G"))
    assert (int(marble), bool(success)) == (150, False)
    _, marble, success = WORLD.step(BOARD, at(5, 4, 1))
    assert (int(marble), bool(success)) == (150, True)


def test_both_marbles_start_in_the_top_row_with_a_tint_of_their_own() -> None:
    assert WORLD.start(torch.tensor([0, 3]), 0).tolist() == [0, 15]
    assert WORLD.start(torch.tensor([0, 3]), 1).tolist() == [1, 16]


def test_the_first_marble_must_take_the_key() -> None:
    plain = board(".....", ".....", ".....", ".....", "vvvvv", "k__g_")
    positions, success = play(WORLD, WORLD.step, plain.expand(2, -1), torch.tensor([[2, 4], [3, 4]]))
    assert positions.tolist() == [[25, 28], [26, 28]]  # tint 0 goes two to the left, tint 1 one
    assert success.tolist() == [True, False]


@each_world
def test_outcomes_are_those_of_the_slow_simulator(world: MarbleWorld) -> None:
    families = permutations(world.config)
    cells = world.draw(Draws.from_seeds([1, 2]), 500)
    found = outcomes(world, world.step, cells)
    plans = torch.tensor(PLANS).expand(2, 500, -1, -1)
    positions, success = found.of(plans)
    for s, b in itertools.product(range(2), range(500)):
        slow = [trial(cells[s, b].tolist(), plan, families) for plan in PLANS]
        assert positions[s, b].tolist() == [lasts for lasts, _ in slow]
        assert success[s, b].tolist() == [won for _, won in slow]
    played = Played(world, world.step, cells).of(plans)
    assert torch.equal(played[0], positions)
    assert torch.equal(played[1], success)


@pytest.mark.parametrize("seed", range(6))
def test_no_two_families_commute_and_each_moves_most_tints(seed: int) -> None:
    found = permutations(WorldConfig(permutation_seed=seed))
    assert len(set(found)) == 4
    for p in found:
        assert sorted(p) == list(range(5))
        assert sum(p[t] != t for t in range(5)) >= 4
    for p, q in itertools.combinations(found, 2):
        assert [p[q[t]] for t in range(5)] != [q[p[t]] for t in range(5)]


def test_the_table_that_everything_was_chosen_on() -> None:
    assert permutations(WorldConfig()) == ((4, 0, 1, 3, 2), (3, 4, 0, 1, 2), (2, 4, 1, 3, 0), (1, 4, 3, 2, 0))
    assert permutations(WorldConfig(permutation_seed=1)) != permutations(WorldConfig())


def test_more_families_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match="permutation_seed 0 is a table of 4 families"):
        WorldConfig(families=5)
    MarbleWorld(WorldConfig(families=6, permutation_seed=1))


def check_boards(world: MarbleWorld, cells: Tensor) -> None:
    """One key, one goal, wedges above the floor, whole curtain rows but for walls, nothing else."""
    R = world.curtain_rows
    rows = cells.reshape(-1, world.rows, world.columns)
    floor = rows[:, -1].sort(-1).values
    assert (floor == torch.tensor([FLOOR, FLOOR, FLOOR, KEY, SEALED])).all()
    assert (rows[:, -2] == WEDGE).all()
    assert (rows[:, R:-2] == EMPTY).all()
    curtains = rows[:, :R]
    assert ((curtains == WALL).sum((1, 2)) <= 1).all()
    kinds = torch.where(curtains == WALL, -1, curtains).amax(-1, keepdim=True)
    assert ((curtains == kinds) | (curtains == WALL)).all()
    assert ((kinds == EMPTY) | (kinds >= CURTAIN)).all()


@each_world
def test_boards_and_their_mutants_are_boards_and_never_withheld_ones(world: MarbleWorld) -> None:
    withheld = rule(world, ["abc", "bd", "acd"])
    cells = draw_legal(world, Draws.from_seeds([0, 1, 2]), withheld, 400)
    for generation in range(6):
        check_boards(world, cells)
        assert is_legal(world, cells, withheld).all()
        before = cells
        cells = mutate_legal(world, Draws.from_seeds([3, 4, 5]).of(generation), withheld, cells)
    changed = (cells != before).any(-1).double().mean()
    assert changed > 0.5


def test_raw_boards_hold_what_is_promised() -> None:
    cells = WORLD.draw(Draws.from_seeds([0]), 10_000)[0]
    rows = WORLD.arrangement(cells)
    assert rows.double().histc(5, 0, 4) == pytest.approx(torch.full((5,), 6_000.0).tolist(), rel=0.05)
    assert (cells == WALL).any(-1).double().mean().item() == pytest.approx(0.5, abs=0.02)
    solvable = outcomes(WORLD, WORLD.step, cells[:4000]).solvable.double().mean().item()
    assert solvable == pytest.approx(0.84, abs=0.02)


def test_legal_is_what_lacks_one_of_the_withheld_families() -> None:
    curtains = (
        ("aaaaa", "bbbbb", "ccccc"),
        ("aaaaa", "b#bbb", "ddddd"),
        ("aaaaa", "bbbbb", "aaaaa"),
        ("ccccc", ".....", "aaaaa"),
        ("bbbbb", "ccccc", "ddddd"),
    )
    cells = torch.stack([board(*rows, ".....", "vvvvv", "k_g__") for rows in curtains])[None]
    assert is_legal(WORLD, cells, rule(WORLD, ["abc"])).tolist() == [[False, True, True, True, True]]
    assert is_legal(WORLD, cells, rule(WORLD, ["abc"], pairs=True)).tolist() == [[False, False, True, True, False]]


@each_world
@pytest.mark.parametrize("families", ["abc", "bcd"])
def test_certified_boards_hold_the_families_and_can_be_solved(world: MarbleWorld, families: str) -> None:
    found = certified_set(world, families, 200)
    assert len(found.cells) == 200
    check_boards(world, found.cells)
    wanted = ["abcd".index(letter) for letter in families]
    assert families_on(world, found.cells).nonzero()[:, 1].view(200, -1).tolist() == [wanted] * 200
    table = permutations(world.config)
    number = 0
    for cells, wins in zip(found.cells.tolist(), found.outcomes.success, strict=True):
        plans = winning(cells, table)
        assert plans == [tuple(plan) for plan in wins.nonzero().tolist()]
        assert plans
        number += len(plans)
    assert found.chance == pytest.approx(number / 200 / 25)
    assert certified_set(world, families, 200).sha256 == found.sha256
    assert certified_set(world, families, 200, seed=1).sha256 != found.sha256


@pytest.mark.parametrize("withheld", ["abc", "abd", "acd", "bcd"])
def test_every_tint_meets_every_curtain_in_training_whatever_is_withheld(withheld: str) -> None:
    law = rule(WORLD, [withheld])
    seen = random_play(WORLD, Draws.from_seeds([0]), draw_legal(WORLD, Draws.from_seeds([0]), law, 2500))
    counts = coverage(WORLD, seen)
    assert counts.shape == (1, 4, 5)
    assert counts.min() > 100
    assert is_legal(WORLD, seen.cells, law).all()


def test_draws_depend_on_seed_and_purpose_and_on_nothing_else() -> None:
    many, one = Draws.from_seeds([7, 8, 9]), Draws.from_seeds([8])
    assert torch.equal(many.of("a", 1).uniform(3, 4)[1], one.of("a", 1).uniform(3, 4)[0])
    assert not torch.equal(one.of("a", 1).uniform(9), one.of("a", 2).uniform(9))
    assert not torch.equal(one.of("a", 1).uniform(9), one.of("b", 1).uniform(9))
    numbers = Draws.from_seeds([0]).uniform(100_000)[0]
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.histc(10, 0, 1).tolist() == pytest.approx([10_000] * 10, rel=0.04)
    assert torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1].abs() < 0.01
    assert sorted(Draws.from_seeds([0]).subset(5, 5)[0].tolist()) == [0, 1, 2, 3, 4]


def test_the_numbers_are_those_of_splitmix64() -> None:
    """The first outputs of the published generator with state 1234567, of which we keep 53 bits."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = Draws(torch.tensor([1234567])).uniform(3)[0]
    assert found.tolist() == [(number >> 11) * 2**-53 for number in published]


def test_choosing_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = torch.tensor([0.0, 0.499, 0.5, 0.79, 0.81, 0.9999999])
    assert choose(probabilities.expand(6, -1), uniform.double()).tolist() == [0, 0, 2, 2, 3, 3]
