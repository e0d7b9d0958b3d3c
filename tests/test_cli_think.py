"""`longread think` as a user meets it, with tiny agents and with the one in the box."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from longread.cli import main
from longread.cli.arguments import changed
from longread.thinking import (
    BOXED,
    Cohort,
    Report,
    ThinkingConfig,
    as_svg,
    certified_set,
    evaluate,
    open_thinker,
    think,
)
from longread.thinking.conditions import (
    ANOTHER,
    AT_ONCE,
    MODEL,
    REASONER,
    SEARCH,
    SHOOTING,
    SIMULATOR,
    UNTRAINED,
)
from tests.forked import command

ROOT = Path(__file__).parent.parent
TINY = [
    *("--set", "world_model.steps=3", "--set", "world_model.width=4", "--set", "world_model.boards=20"),
    *("--set", "width=12", "--set", "key_width=6", "--set", "teacher_width=6", "--set", "boards=4"),
    *("--iterations", "3", "--trials", "2", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny agent."""
    out = tmp_path_factory.mktemp("think") / "run"
    assert main(["think", "train", "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def boxed() -> Report:
    """The agent in the box, on few boards."""
    return evaluate(open_thinker(), boards=40, tries=2, seen=False)


def test_training_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "run", tmp_path / "row.json"
    assert main(["think", "train", "--out", str(out), *TINY, "--json", str(figures), "--withheld", "bcd"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"run: 6 steps, [\d,]+ parameters", printed.out)
    assert "step 6/6  agent: acts at once" in printed.err
    row = json.loads(figures.read_text())
    assert (row["format"], row["step"]) == ("longread-thinking-training/1", 6)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6
    assert open_thinker(out).config.withheld == "bcd"


def test_evaluating_gives_tables_figures_and_a_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    arguments = ["think", "evaluate", run, "--boards", 6, "--tries", 2, "--json", figures, "--report", page]
    assert main([str(a) for a in arguments]) == 0
    out = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert list(found["combinations"]) == ["abc", "abd", "acd", "bcd"]
    withheld = found["combinations"]["abc"]
    assert withheld["real_drops"] == dict.fromkeys(withheld["success"], 6 * 2 * 2)
    assert len(withheld["success_by_trials"]) == 17
    for name, rate in withheld["success"].items():
        assert re.search(rf"{re.escape(name)} +│ +{rate:.3f} ", out), name
    text = page.read_text()
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "<script" not in text
    assert f"{withheld['success'][MODEL]:.3f}" in text


def test_watching_shows_every_imagined_trial_and_the_real_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, page = tmp_path / "thought.json", tmp_path / "thought.html"
    assert main(["think", "watch", "--board", "3", "--json", str(figures), "--report", str(page)]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"imagined \d|THE REAL TRIAL", out) == [f"imagined {i}" for i in range(1, 9)] + ["THE REAL TRIAL"]
    thinker = open_thinker()
    board = certified_set(thinker.world, thinker.config.withheld, 3).cells[2]
    thought = think(thinker, board)
    found = json.loads(figures.read_text())
    assert found["act"] == json.loads(json.dumps(thought.act))
    text = page.read_text()
    assert text.count("<figure>") == 9
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "<script" not in text
    drawing = ElementTree.fromstring(as_svg(thought, thinker.world))
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}svg"))) == 10


def test_the_agent_in_the_box_is_small_and_thinking_pays(boxed: Report) -> None:
    path = ROOT / "models" / BOXED / "agent.safetensors"
    assert path.stat().st_size < 1_000_000
    found = {name: float(rate) for name, rate in boxed.of_withheld.success.items()}
    assert found[AT_ONCE] <= 0.3
    assert found[MODEL] >= found[AT_ONCE] + 0.5
    assert found[MODEL] >= found[SHOOTING] + 0.3
    assert found[MODEL] == pytest.approx(found[SIMULATOR], abs=0.05)
    assert max(found[UNTRAINED], found[ANOTHER]) <= found[AT_ONCE] + 0.05
    assert found[SEARCH] >= 0.95
    assert found[REASONER] == pytest.approx(0.85, abs=0.12)
    assert min(float(boxed.of_withheld.quality.recall), float(boxed.of_withheld.quality.precision)) >= 0.95
    assert "the simulator adds nothing" in boxed.reasons()[0]


def test_a_world_model_that_is_damaged_costs_success_and_the_report_says_why(boxed: Report) -> None:
    hurt = evaluate(open_thinker(), boards=40, tries=2, seen=False, damage=1.0)
    assert float(hurt.of_withheld.success[MODEL]) < float(boxed.of_withheld.success[MODEL]) - 0.2
    assert float(hurt.of_withheld.success[SIMULATOR]) == float(boxed.of_withheld.success[SIMULATOR])
    assert float(hurt.of_withheld.quality.recall) < 0.8
    reason = hurt.reasons()[0]
    assert f"the world model knows only {float(hurt.of_withheld.quality.recall):.0%} of the plans that win" in reason
    assert "damaged on purpose" in hurt.reasons()[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train", "--out", ""], "--out is empty; name a directory"),
        (["train", "--out", "x", "--withheld", "xyz"], "withheld is 'xyz'; it must be different letters of abcd"),
        (["train", "--out", "x", "--set", "speed=3"], "there is no such field"),
        (["train", "--out", "x", "--selection", "best"], "selection is 'best'; it must be one of random, gap"),
        (["evaluate", "nowhere"], "no agent at nowhere: there is nothing"),
        (["evaluate", "--damage", "-1"], "damage is -1.0; it must be at least 0"),
        (["watch", "--trials", "-1"], "trials is -1; it must be at least 0"),
        (["watch", "--families", "xy"], "families is 'xy'"),
        (["watch", "--board", "100000"], "--board 100000 is more than 10000 boards"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["think", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longread: error: ")]
    assert reason in line
    assert not Path("x").exists()


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "thinking.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "thinking.md", "exec"), {})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("8 (")
    assert second.startswith("Thinking takes success on acd from 0.")
    assert third.startswith("4 0.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """The signal is sent when the first row is there, and training would go on for hours."""
    process = command("think", "train", "--out", tmp_path / "run", *TINY, "--iterations", 1_000_000, "--json", "-")
    for line in process.stderr:
        if "step " in line:
            break
    process.send_signal(number)
    err = process.stderr.read()
    assert process.wait(120) == 128 + number, err
    step = json.loads(process.stdout.read())["step"]
    assert "saving a checkpoint" in err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == step
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_an_agent_that_is_trained_here_learns_to_think(tmp_path: Path) -> None:
    """The whole way with another seed than that of the agent in the box; two minutes on an idle core."""
    assert main(["think", "train", "--out", str(tmp_path / "run"), "--withheld", "acd", "--seed", "1"]) == 0
    report = evaluate(open_thinker(tmp_path / "run"), boards=100)
    found = {name: float(rate) for name, rate in report.of_withheld.success.items()}
    assert min(float(report.of_withheld.quality.recall), float(report.of_withheld.quality.precision)) >= 0.95
    assert found[MODEL] >= found[AT_ONCE] + 0.5
    assert found[MODEL] >= found[SHOOTING] + 0.3
    seen = [float(e.success[AT_ONCE]) for families, e in report.evaluations.items() if families != "acd"]
    assert sum(seen) / len(seen) >= found[AT_ONCE] + 0.25


@pytest.mark.gpu
def test_a_gpu_trains_and_evaluates_as_a_cpu_does(tmp_path: Path) -> None:
    """Draws are the same numbers on both, so that the first steps are the same up to rounding."""
    config = changed(ThinkingConfig(), [*TINY[1::2][:6], "iterations=3", "trials=2"])
    cohorts = [Cohort(config, seeds=[0, 1], withheld=["abc", "bcd"], device=device) for device in ("cpu", "cuda")]
    for _ in range(config.world_model.steps + 3):
        first, second = (cohort.advance() for cohort in cohorts)
        for name, values in first.items():
            assert second[name] == pytest.approx(values, rel=1e-3, abs=1e-4), name
    again = Cohort(config, seeds=[0, 1], withheld=["abc", "bcd"], device="cuda")
    again.restore(cohorts[1].step, {name: value.cpu() for name, value in cohorts[1].tensors().items()})
    for name, value in again.tensors().items():
        assert torch.equal(value.cpu(), cohorts[1].tensors()[name].cpu()), name
    thinker = open_thinker(device="cuda")
    report = evaluate(thinker, boards=40, tries=2, seen=False, damage=0.01)
    assert float(report.of_withheld.success[MODEL]) > 0.8
    assert len(think(thinker, certified_set(thinker.world, "acd", 1).cells[0]).trials) == 8
