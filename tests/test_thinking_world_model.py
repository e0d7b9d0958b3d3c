"""The learned world model of thinking agents: what it sees, how it is asked, and what damage is."""

from __future__ import annotations

import pytest
import torch

from longread.thinking import MarbleWorld, WorldConfig
from longread.thinking.draws import Draws
from longread.thinking.tasks import draw_legal, random_play, rule
from longread.thinking.world_model import WorldModel, damaged

WORLD = MarbleWorld(WorldConfig())


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.set_default_dtype(torch.float64)


def test_the_loss_is_that_of_cells_marble_and_success() -> None:
    model = WorldModel(WORLD, Draws.from_seeds([0, 1]), 8)
    draws = Draws.from_seeds([0, 1])
    played = random_play(WORLD, draws, draw_legal(WORLD, draws, rule(WORLD, ["abc", "abd"]), 5))
    seen = type(played)(*(part[:, :7] for part in played))
    cells, marble, success = model(seen.cells, seen.marble)
    assert marble.shape == (2, 7, 151)
    for s in range(2):
        total = 0.0
        for i in range(7):
            of_cells = -torch.log_softmax(cells[s, i], -1).gather(-1, seen.next_cells[s, i][:, None]).mean()
            of_marble = -torch.log_softmax(marble[s, i], -1)[seen.next_marble[s, i]]
            won = torch.sigmoid(success[s, i])
            of_success = won.log() if seen.success[s, i] else (1 - won).log()
            total += (30 * of_cells + of_marble - of_success).item()
        assert model.loss(seen)[s].item() == pytest.approx(total / 7)


def test_a_world_model_learns_what_it_is_shown() -> None:
    model = WorldModel(WORLD, Draws.from_seeds([0]), 16)
    draws = Draws.from_seeds([0])
    seen = random_play(WORLD, draws, draw_legal(WORLD, draws, rule(WORLD, ["abc"]), 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(seen).sum().backward()
        optimizer.step()
    cells, marble, success = model.step(seen.cells, seen.marble)
    assert torch.equal(marble[seen.valid], seen.next_marble[seen.valid])
    assert torch.equal(cells[seen.valid], seen.next_cells[seen.valid])
    assert torch.equal(success[seen.valid], seen.success[seen.valid])


def test_a_world_model_asked_in_parts_answers_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = WorldModel(WORLD, Draws.from_seeds([0, 1]), 8)
    cells = WORLD.draw(Draws.from_seeds([0, 1]), 7)
    marble = Draws.from_seeds([2, 3]).integers(151, 7)
    whole = model.step(cells, marble)
    monkeypatch.setattr("longread.thinking.world_model._BOARDS_AT_ONCE", 4)
    for part, all_ in zip(model.step(cells, marble), whole, strict=True):
        assert torch.equal(part, all_)


def test_a_case_that_occurs_twice_is_answered_as_if_it_were_alone() -> None:
    model = WorldModel(WORLD, Draws.from_seeds([0]), 8)
    cells, marble = WORLD.draw(Draws.from_seeds([4]), 5), Draws.from_seeds([5]).integers(151, 5)
    order = torch.tensor([3, 0, 3, 1, 4, 4, 2])
    answers = model.step(cells[:, order], marble[:, order])
    for i, j in enumerate(order.tolist()):
        logits = model(cells[:, j : j + 1], marble[:, j : j + 1])
        there = int(marble[0, j]) < 150
        assert torch.equal(answers[0][0, i], logits[0].argmax(-1)[0, 0] if there else cells[0, j])
        assert int(answers[1][0, i]) == (int(logits[1].argmax(-1)) if there else 150)
        assert bool(answers[2][0, i]) == (there and bool(logits[2] > 0))


def test_a_world_model_sees_two_columns_and_one_row_around_a_cell_and_the_highest_of_all() -> None:
    """Beyond that only through the maximum over all cells, which is switched off here."""
    model = WorldModel(WORLD, Draws.from_seeds([0]), 8)
    with torch.no_grad():
        model.whole.weight.zero_()
    cells, marble = WORLD.draw(Draws.from_seeds([0]), 1), torch.tensor([[150]])
    logits = model(cells, marble)[0]
    other = cells.clone()
    other[0, 0, 0] = 3
    changed = (model(other, marble)[0] != logits).any(-1)[0, 0].view(6, 5)
    assert changed[:2].all()  # columns go round the edge: two to each side are all
    assert not changed[2:].any()


def test_damage_is_noise_of_the_size_that_was_asked_for() -> None:
    model, same = (WorldModel(WORLD, Draws.from_seeds([0]), 32) for _ in range(2))
    damaged(model, 0.5, seed=1)
    for (name, weight), (_, before) in zip(model.named_parameters(), same.named_parameters(), strict=True):
        change = (weight - before).detach()
        wanted = 0.5 * before.std() if name.endswith("weight") else torch.tensor(0.0)
        if weight.numel() > 1000 or not name.endswith("weight"):
            assert change.std(unbiased=False).item() == pytest.approx(wanted.item(), rel=0.1), name
