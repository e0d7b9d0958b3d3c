"""Training of thinking agents: selection, runs, checkpoints, exact resume; the agent as a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longread import files
from longread.config import TrainingHalted, UserError
from longread.thinking import (
    Cohort,
    MarbleWorld,
    ModelTraining,
    ThinkingConfig,
    WorldConfig,
    evaluate,
    open_thinker,
    save_thinker,
    think,
    train,
)
from longread.thinking.draws import Draws
from longread.thinking.selection import Fresh, Population, Sequences, gap, gap_unsolved, learnability, make_selector
from longread.thinking.tasks import is_legal, rule
from longread.thinking.train import CHECKPOINT, METRICS_FILE, RUN_FILE
from longread.thinking.world import TUNED
from tests.marble_run import trial

MODEL = ModelTraining(steps=3, batch_size=8, width=4, boards=20, renew_every=2)
CONFIG = ThinkingConfig(
    world_model=MODEL, iterations=4, width=12, key_width=6, teacher_width=6, boards=4, copies=2, trials=2,
    population=40, warmup=2, checkpoint_every=2, selection="gap_unsolved",
)  # fmt: skip
WORLD = MarbleWorld(WorldConfig())


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what time does to it."""
    lines = (run / METRICS_FILE).read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def weights(run: Path) -> dict[str, Tensor]:
    return files.read_tensors(run / "agent.safetensors")[0]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_scores_of_boards() -> None:
    before, after = torch.tensor([0.0, 0.25, 0.5]), torch.tensor([1.0, 0.5, 0.25])
    assert gap(before, after).tolist() == [1.0, 0.25, -0.25]
    assert learnability(before, after).tolist() == [0.0, 0.25, 0.1875]
    assert gap_unsolved(before, after).tolist() == [0.0, 0.125, -0.1875]


def test_a_population_lets_the_worst_go_and_keeps_the_best() -> None:
    config = dataclasses.replace(CONFIG, selection="gap", boards=20, population=20, replaced=4, fresh=1)
    law = rule(WORLD, ["abc"])
    population = Population(WORLD, law, Draws.from_seeds([0]), config)
    draws = Draws.from_seeds([1])
    met = population.boards(draws.of(0))
    after = torch.arange(20.0)[None] / 20
    population.update(draws.of(0), torch.zeros(1, 20), after)
    left = {tuple(cells) for cells in population.cells[0].tolist()}
    assert {tuple(cells) for cells in met[0, 4:].tolist()} <= left
    assert population.tried.sum() == 16
    assert sorted(population.score[population.tried].tolist()) == pytest.approx([i / 20 for i in range(4, 20)])
    best = population.cells[0, population.score[0].argmax()].clone()
    chosen = population.boards(draws.of(1))
    place = int((chosen[0] == best).all(-1).nonzero()[0])
    population.update(
        draws.of(1), torch.zeros(1, 20), torch.full((1, 20), 0.5).index_fill(1, torch.tensor([place]), 0.75)
    )
    kept = (population.cells[0] == best).all(-1)
    assert population.score[0][kept].max().item() == pytest.approx((0.95 + 0.75) / 2)


def test_sequences_that_gain_by_thinking_are_drawn_more() -> None:
    law = rule(WORLD, ["abc"])
    selector = Sequences(WORLD, law, 64, 1)
    places = 5 ** torch.arange(3)
    wanted = int((torch.tensor([0, 0, 1]) * places).sum())  # a, a, b

    def share() -> float:
        cells = selector.boards(Draws.from_seeds([0]).of("try"))
        return ((WORLD.arrangement(cells) * places).sum(-1) == wanted).double().mean().item()

    before = share()
    selector.gap[0, wanted] = 1.0
    assert share() > before + 0.05
    selector.update(Draws.from_seeds([0]), torch.zeros(1, 64), torch.full((1, 64), 0.5))
    assert selector.gap[0, wanted].item() == pytest.approx(0.75)


@pytest.mark.parametrize("selection", ["random", "gap", "learnability", "gap_unsolved", "sequence_gap"])
def test_no_board_of_training_is_withheld(selection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Tensor] = []
    config = dataclasses.replace(CONFIG, selection=selection, boards=16, iterations=6)
    cohort = Cohort(config, seeds=[0, 1], withheld=["abc", "bcd"])
    import longread.thinking.cohort as module

    for name, boards_of in (("episode", lambda *a: a[1]), ("random_play", lambda *a: a[2])):
        original = getattr(module, name)

        def spying(*args: Any, original: Any = original, boards_of: Any = boards_of) -> Any:
            met.append(boards_of(*args))
            return original(*args)

        monkeypatch.setattr(module, name, spying)
    while cohort.step < cohort.steps:
        cohort.advance()
    assert len(met) == 6 + 2
    assert all(is_legal(WORLD, cells, cohort.rule).all() for cells in met)
    kind = {"random": Fresh, "sequence_gap": Sequences}.get(selection, Population)
    assert isinstance(make_selector(WORLD, cohort.rule, cohort.draws, config), kind)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = train(CONFIG, tmp_path / "whole")
    assert whole.thinker is not None
    for stop in (2, 5):  # in the world model's training, and in the agent's
        seen: list[int] = []
        result = train(CONFIG, tmp_path / f"{stop}", stopped=lambda seen=seen, stop=stop: len(seen) >= stop,
                       on_step=lambda row, seen=seen: seen.append(row["step"]))  # fmt: skip
        assert (result.step, result.thinker) == (stop, None)
        assert not (tmp_path / f"{stop}" / "agent.safetensors").exists()
        assert train(CONFIG, tmp_path / f"{stop}", resume=True).thinker is not None
        assert same(weights(tmp_path / "whole"), weights(tmp_path / f"{stop}"))
        assert rows(tmp_path / "whole") == rows(tmp_path / f"{stop}")
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(1, 8))
    assert [row["part"] for row in rows(tmp_path / "whole")] == ["world model"] * 3 + ["agent"] * 4
    assert len(files.read_json(tmp_path / "2" / RUN_FILE, kind="run")["resumed"]) == 1
    again = train(CONFIG, tmp_path / "whole", resume=True)
    assert again.row is None
    assert again.thinker is not None


def test_rows_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def crash(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise Crash

    with pytest.raises(Crash):
        train(CONFIG, tmp_path / "run", on_step=crash)
    assert len(rows(tmp_path / "run")) == 5  # and the checkpoint is of step 4
    train(CONFIG, tmp_path / "run", resume=True)
    train(CONFIG, tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_what_a_run_refuses(tmp_path: Path) -> None:
    train(CONFIG, tmp_path / "run", stopped=lambda: True)
    with pytest.raises(UserError, match="already holds a run; resume it"):
        train(CONFIG, tmp_path / "run")
    other = dataclasses.replace(CONFIG, withheld="abd")
    for _ in range(2):  # before there is a checkpoint, and after
        with pytest.raises(UserError, match="was begun with another withheld"):
            train(other, tmp_path / "run", resume=True)
        train(CONFIG, tmp_path / "run", resume=True)
    path = tmp_path / "run" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is truncated"):
        train(CONFIG, tmp_path / "run", resume=True)
    path.unlink()
    with pytest.raises(UserError, match="holds an agent but no checkpoint"):
        train(CONFIG, tmp_path / "run", resume=True)


def test_a_number_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    wild = dataclasses.replace(CONFIG, world_model=dataclasses.replace(MODEL, lr=1e30, steps=8), checkpoint_every=1)
    with pytest.raises(TrainingHalted, match=r"halted at step 2: the loss is .*the checkpoint of step 1 is kept"):
        train(wild, tmp_path / "run")
    assert TrainingHalted.exit_status == 3
    assert files.read_tensors(tmp_path / "run" / CHECKPOINT)[1]["step"] == 1
    assert len(rows(tmp_path / "run")) == 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Cohort.advance

    def spoiling(self: Cohort) -> Any:
        row = advance(self)
        if self.step == 4:
            with torch.no_grad():
                self.agent.first.weight[0, 0, 0] = torch.inf
        return row

    monkeypatch.setattr(Cohort, "advance", spoiling)
    with pytest.raises(TrainingHalted, match=r"is not finite after the update; the checkpoint of step 2 is kept"):
        train(CONFIG, tmp_path / "run")
    assert files.read_tensors(tmp_path / "run" / CHECKPOINT)[1]["step"] == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"withheld": "abx"}, "must be different letters of abcd"),
        ({"withheld": "abcd"}, "3 curtain rows hold at most"),
        ({"boards": 41}, "must be at most population, 40"),
        ({"agent": "recurrent", "swapped_share": 0.5}, "leave them out"),
        ({"selection": "best"}, "selection is 'best'"),
        ({"replaced": 30}, "at most half of population"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
    ],
)
def test_a_config_that_cannot_run_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        dataclasses.replace(CONFIG, **change)
    assert ThinkingConfig.from_dict(json.loads(json.dumps(CONFIG.as_dict()))) == CONFIG


def test_an_agent_as_a_file(tmp_path: Path) -> None:
    thinker = train(CONFIG, tmp_path / "run").thinker
    assert thinker is not None
    save_thinker(tmp_path / "half.safetensors", thinker, dtype=torch.float16)
    for path in (tmp_path / "run", tmp_path / "run" / "agent.safetensors", tmp_path / "half.safetensors"):
        opened = open_thinker(path)
        assert opened.config == CONFIG
        for (name, weight), (_, other) in zip(
            opened.agent.named_parameters(), thinker.agent.named_parameters(), strict=True
        ):
            torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4, msg=name)
            assert weight.dtype == torch.float32
    with pytest.raises(UserError, match="no agent at"):
        open_thinker(tmp_path / "nothing")
    with pytest.raises(UserError, match="its training is not finished"):
        open_thinker(tmp_path)
    with pytest.raises(UserError, match=r"holds thinking checkpoint, not thinking agent"):
        open_thinker(tmp_path / "run" / CHECKPOINT)
    with pytest.raises(UserError, match="tries is 0; it must be at least 1"):
        evaluate(thinker, tries=0)
    with pytest.raises(UserError, match="a board is 30 cells"):
        think(thinker, torch.zeros(29, dtype=torch.int64))


def test_a_thought_is_played_as_it_is_shown(tmp_path: Path) -> None:
    thinker = train(CONFIG, tmp_path / "run").thinker
    assert thinker is not None
    cells = WORLD.draw(Draws.from_seeds([3]), 1)[0, 0]
    thought = think(thinker, cells, trials=3, seed=1)
    assert len(thought.trials) == 3
    assert [path[0].position for path in thought.act.paths] == list(thought.act.plan)
    assert [path[0].tint for path in thought.act.paths] == [0, 1]
    lasts, won = trial(cells.tolist(), thought.act.plan, TUNED)
    assert [path[-1].position for path in thought.act.paths] == lasts
    assert thought.act.success == won
    assert think(thinker, cells, trials=3, seed=1) == thought
    assert think(thinker, cells, trials=0, seed=1).trials == ()
