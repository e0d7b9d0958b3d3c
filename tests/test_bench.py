"""`longread bench`: right or no time, counts that agree with hand and machine, figures that follow from rows."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longread.bench import (
    Case,
    Machine,
    Outcome,
    markdown,
    merged,
    plan,
    read_rows,
    run_cases,
    save_bench_plots,
    training,
)
from longread.bench.cases import SIZE_NAMES
from longread.bench.gate import GateFailed, GateResult, check_gradients, judged, refusing_fallbacks
from longread.bench.machine import repeated, versions
from longread.bench.plots import bench_charts
from longread.bench.profile import covered, describe, kind_of
from longread.bench.report import NAMES, seconds_per_token, share_of_peak, times_full_attention
from longread.bench.rows import KEYS, make_row
from longread.bench.training import measure_first_step
from longread.cli import main
from longread.config import UserError
from longread.evaluate.drawing import Stroke, draw
from longread.flops import reading_flops, training_flops
from longread.inner_loop import optimizers, read
from longread.inner_loop.graphs import GraphRefused
from longread.model import Transformer
from longread.recipes import RECIPES, recipe

CPU = torch.device("cpu")
TOY = ("--device", "cpu", "--sizes", "toy", "--repeats", "1")


def row(measure: str, method: str, value: float, context: int = 8192, size: str = "3b", **other: Any) -> dict[str, Any]:
    work = Case.of_row({"measure": measure, "method": method, "size": size, "context": context, "sequences": 1}).work
    made = make_row(Case(work, method, size, context), [value], 10.0, torch.device("cpu"))
    return (
        made
        | {"versions": {"torch": "2", "triton": "3", "python": "3", "driver": "580", "device": "NVIDIA H200"}}
        | other
    )


@pytest.fixture(autouse=True)
def _known_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "measured_machine" not in request.fixturenames:
        monkeypatch.setattr("longread.bench.run.measure_machine", lambda device: Machine("one", "product", 1e11, 1e10))


@pytest.fixture
def short_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of what surrounds the gates: narrow networks, texts of three mini-batches, few tokens written."""
    for name, value in {"_VOCABULARY": 100, "_WIDTH": 64, "_MINI_BATCH": 32, "_TOKENS": 96}.items():
        monkeypatch.setattr(f"longread.bench.gate.{name}", value)
    monkeypatch.setattr("longread.bench.decode.LEAST_WRITTEN", 32)


@pytest.fixture
def measured_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that wants the real one, measured once instead of ten times."""
    monkeypatch.setattr("longread.bench.machine.repeated", lambda device, work, _: repeated(device, work, 1))


# What is right.


@pytest.mark.usefixtures("short_gates")
def test_a_wrong_step_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_gradients("e2e", 32, CPU).passed
    make_wrong(monkeypatch)
    assert not check_gradients("e2e", 32, CPU).passed
    assert check_gradients("swa", 32, CPU).passed


@pytest.mark.usefixtures("short_gates")
@pytest.mark.parametrize("method", ["e2e", pytest.param("swa", marks=pytest.mark.slow)])
def test_a_schedule_that_is_wrong_is_red(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Transformer.lower

    def wrong(model: Transformer, *args: Any, recompute: bool = False, **options: Any) -> Any:
        hidden, own = right(model, *args, recompute=recompute, **options)
        return hidden.roll(1, -1) if recompute else hidden, own

    monkeypatch.setattr(Transformer, "lower", wrong)
    assert not check_gradients(method, 32, CPU).passed


def test_what_may_be_computed_again_is_what_may_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(method: str, size: str, context: int, gib: float = 139.8) -> list[str]:
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(gib * 2**30))
        )
        monkeypatch.setattr(training, "precision_on", lambda device: "bfloat16")
        return training.schedules(Case("train", method, size, context).config, torch.device("cuda"))

    assert found("e2e", "3b", 8192)[0] == "none"
    assert found("full", "760m", 32_768)[:3] == ["none", "2-blocks", "4-blocks"]  # each attempt takes 5 % less
    assert found("full", "760m", 32_768)[-1] == "blocks"
    assert found("full", "760m", 131_072)[0] == "7-blocks"
    assert found("e2e", "760m", 131_072)[:2] == ["42-steps", "48-steps"]
    assert found("e2e", "3b", 8192, gib=16) == ["6-steps"]  # none fits: the leanest


def make_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner step goes one per cent too far, in the timed precision only."""
    right = optimizers.clipped_sgd

    def wrong(weights: Any, gradients: Any, *, lr: Any, **options: Any) -> Any:
        return right(weights, gradients, lr=lr * (1.01 if weights[0].dtype == torch.float32 else 1.0), **options)

    monkeypatch.setattr(optimizers, "clipped_sgd", wrong)


@pytest.mark.usefixtures("short_gates")
def test_no_speed_on_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_wrong(monkeypatch)
    path = tmp_path / "rows.json"
    arguments = ["bench", "train", *TOY, "--methods", "e2e", "swa", "--contexts", "64", "--sequences", "1"]
    assert main([*arguments, "--json", str(path)]) == 1
    assert [found["method"] for found in json.loads(path.read_text())] == ["swa"]
    page = capsys.readouterr().out
    assert "outer gradients, e2e, head dim 32, float32: RED" in page
    assert "- train toy e2e 64: RED, no time taken: its gate is red" in page


def test_an_error_of_a_narrow_type_is_measured_in_that_of_a_reference() -> None:
    exact = [torch.ones(4), torch.ones(4)]
    plain = [torch.full((4,), 1.01), torch.full((4,), 1.001)]
    assert judged("", [torch.full((4,), 1.019), torch.full((4,), 1.0019)], exact, plain).passed
    assert not judged("", [torch.full((4,), 1.021), torch.ones(4)], exact, plain).passed
    assert not judged("", [torch.ones(4), torch.full((4,), 1.0021)], exact, plain).passed
    assert not judged("", [torch.ones(4), torch.full((4,), float("nan"))], exact, plain).passed
    assert not judged("", [torch.full((4,), 1.001)], exact[:1], None).passed


def test_a_fast_path_that_withdraws_is_red() -> None:
    import warnings

    with pytest.raises(GateFailed, match="captured mini-batches"), refusing_fallbacks():
        warnings.warn("captured mini-batches score a token 1.0 nats off", GraphRefused, stacklevel=1)
    with pytest.warns(UserWarning, match="something else"), refusing_fallbacks():
        warnings.warn("something else", stacklevel=1)


@pytest.mark.usefixtures("short_gates")
@pytest.mark.parametrize("work", ["prefill", "decode"])
def test_other_scores_than_in_pieces_are_red(monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """Reading at once learns, reading in pieces or writing does not: a bug that the small gate does not see."""
    from longread.bench import decode, prefill

    def forgetful(model: Any, state: Any, tokens: Any, **settings: Any) -> Any:
        return read(model, state, tokens, **settings, learn=tokens.shape[1] > 32)

    monkeypatch.setattr(prefill if work == "prefill" else decode, "read", forgetful)
    if work == "decode":
        monkeypatch.setattr(decode, "next_token_logits", lambda model, state: torch.rand(1, 257))
    outcome = run_cases([Case(work, "e2e", "toy", 256)], CPU, repeats=1)
    assert outcome.red
    assert outcome.rows == []
    assert "RED, no time taken" in outcome.failures[0][1]


@pytest.mark.usefixtures("short_gates")
def test_what_does_not_fit_is_a_line_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from longread.bench import prefill

    right = prefill.reading_model

    def sometimes(case: Case, device: torch.device) -> Transformer:
        if case.context == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(case, device)

    monkeypatch.setattr(prefill, "reading_model", sometimes)
    outcome = run_cases([Case("prefill", "swa", "toy", context) for context in (64, 96)], CPU, repeats=1)
    assert not outcome.red
    assert [str(case) for case, _ in outcome.failures] == ["prefill toy swa 64"]
    assert [found["context"] for found in outcome.rows] == [96]


def test_full_attention_ends_where_its_cache_does() -> None:
    outcome = run_cases([Case("decode", "full", "toy", 1 << 20)], CPU, repeats=1)
    assert outcome.failures[0][1] == "not measured, its cache ends at 131,072 tokens"
    assert not outcome.red


# The command.


@pytest.mark.usefixtures("short_gates")
@pytest.mark.usefixtures("measured_machine")
def test_everything_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, report = tmp_path / "rows.json", tmp_path / "page.md"
    arguments = ["bench", "train", "prefill", "decode", *TOY, "--contexts", "128", "--sequences", "1"]
    arguments += ["--json", str(path), "--report", str(report), "--plots", str(tmp_path / "plots")]
    assert main(arguments) == 0
    rows = json.loads(path.read_text())
    assert [(found["measure"], found["method"]) for found in rows] == [
        (measure, method)
        for measure in ("train_tokens_per_s", "prefill_ms_per_1k", "decode_tokens_per_s")
        for method in ("e2e", "swa", "full")
    ]
    for found in rows:
        assert tuple(found) == (*KEYS, "recompute")[: None if found["measure"] == "train_tokens_per_s" else -1]
        assert found["value"] > 0
        assert found["n"] == 1
    page = capsys.readouterr().out
    assert page == report.read_text()
    assert {plot.name for plot in (tmp_path / "plots").iterdir()} == {"prefill.svg", "training.svg", "decoding.svg"}


@pytest.mark.usefixtures("short_gates")
@pytest.mark.parametrize(
    "work", ["train", pytest.param("prefill", marks=pytest.mark.slow), pytest.param("decode", marks=pytest.mark.slow)]
)
def test_a_profile_is_a_table_of_kinds(work: str) -> None:
    outcome = run_cases([Case(work, "swa", "toy", 32)], CPU, repeats=1, profile=True)
    (text,) = outcome.profiles.values()
    assert "| matrix products |" in text
    assert "| gaps |" in text
    assert f"### {work} toy swa 32\n\n| kind |" in markdown(outcome, command="", hardware=None)


def test_a_first_step_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    found = measure_first_step(Case("first-step", "e2e", "toy", 64), CPU)
    assert (found["measure"], found["unit"], found["n"], found["spread"]) == ("first_step_s", "s", 1, None)
    assert 0 < found["value"] < 60
    import os

    assert os.environ["TRITON_CACHE_DIR"] == "kept"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tran"], "there is no work 'tran' to measure; choose from train, first-step, prefill, decode"),
        (["--sizes", "4b"], "there is no size '4b'"),
        (["--methods", "naive"], "there is no method 'naive'"),
        (
            ["train", "--sizes", "toy", "--contexts", "100"],
            "context_length 100 is not a multiple of model.mini_batch_size",
        ),
        (["train", "--sizes", "3b", "--methods", "full", "--contexts", "4096"], "full attention has a rotary base"),
        (
            ["prefill", "--sizes", "toy", "--contexts", "99999999999"],
            "a context of 99999999999 tokens is more than 16777216; lower --contexts",
        ),
        (
            ["train", "--sizes", "toy", "--contexts", "1024", "--sequences", "99999999999"],
            "99999999999 sequences of 1024 tokens are more than 16777216 tokens a step; lower --sequences",
        ),
        (["--repeats", "99999999"], "--repeats 99999999 is more than 1000 measurements; lower it"),
        (["--device", "banana"], "device banana cannot be used"),
        (["--json", "/"], "cannot write /: it is a directory"),
        (["--from", "missing.json"], "there is no file missing.json"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("longread: error: ")
    assert error.count("\n") == 1
    assert reason in error


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"measure": 1}]', "no json"])
def test_a_file_of_something_else_is_kept(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["bench", "--json", str(path)]) == 2
    assert "is no list of rows" in capsys.readouterr().err
    assert path.read_text() == text


def test_numbers_that_are_no_whole_ones_are_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--repeats", "0"])


# What follows from rows.


def test_plans_have_defaults_and_no_doubles() -> None:
    on_cpu = plan(gpu=False)
    assert {case.size for case in on_cpu if case.work != "first-token"} == {"toy"}
    assert {case.work for case in on_cpu} == {"train", "first-step", "prefill", "decode", "first-read", "first-token"}
    on_gpu = plan(["train"], gpu=True)
    assert Case("train", "e2e", "125m", 8192, 4) in on_gpu
    assert Case("train", "e2e", "125m", 32768, 1) in on_gpu
    assert Case("train", "full", "3b", 8192, 1) in on_gpu
    assert plan(["first-step"], gpu=True, sizes=["3b", "3b"], methods=["e2e"], contexts=[32768, 8192]) == [
        Case("first-step", "e2e", "3b", 8192)
    ]
    assert Case("train", "e2e", "3b", 32768).config.context_length == 32768
    assert Case("train", "e2e", "3b", 32768, 2).config.batch_size == 2
    with pytest.raises(UserError, match="no size"):
        Case("train", "e2e", "banana", 8192)


def test_every_recipe_of_pretraining_can_be_measured() -> None:
    sizes = [name for name in RECIPES if not name.endswith("-extend")]
    cases = plan(["train", "prefill", "decode"], gpu=True, sizes=sizes, contexts=[8192])
    assert {case.size for case in cases} == set(sizes)
    assert {case.config.model.width for case in cases} == {recipe(name).model.width for name in sizes}


def test_help_names_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    page = capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
    assert set(SIZE_NAMES) <= set(page)


def test_rows_about_the_same_thing_replace_each_other(tmp_path: Path) -> None:
    first, other, again = (
        row("prefill_ms_per_1k", "e2e", 30.0),
        row("prefill_ms_per_1k", "swa", 20.0),
        row("prefill_ms_per_1k", "e2e", 25.0),
    )
    assert merged([first, other], [again]) == [again, other]
    elsewhere = again | {"versions": again["versions"] | {"device": "a laptop, 8 threads"}}
    assert merged([first, other], [elsewhere]) == [first, other, elsewhere]
    full = row("prefill_ms_per_1k", "full", 60.0)
    assert times_full_attention(first, [first, full]) == 0.5
    assert times_full_attention(elsewhere, [first, full]) is None
    assert read_rows(tmp_path / "none", missing_ok=True) == []


def test_what_makes_a_gpu_fast_is_no_matter_of_a_cpu() -> None:
    found = versions(torch.device("cpu"))
    assert (found["driver"], found["triton"]) == (None, None)
    assert str(found["device"]).endswith(" threads")


def test_the_plots_of_the_repository_are_those_of_its_rows(tmp_path: Path) -> None:
    """Every row is a point or a bar that says its value, and docs/bench holds what the rows make."""
    root = Path(__file__).parent.parent
    rows = read_rows(root / "benchmarks" / "results" / "h200.json")
    assert "× 8192" not in markdown(Outcome(rows=rows), command="longread bench", hardware=None)
    plots = save_bench_plots(rows, tmp_path)
    assert [plot.name for plot in plots] == ["prefill.svg", "training.svg", "decoding.svg"]
    for plot, measure in zip(plots, ("prefill_ms_per_1k", "train_tokens_per_s", "decode_tokens_per_s"), strict=True):
        assert plot.read_text() == (root / "docs" / "bench" / plot.name).read_text()
        shown = Counter(title.text for title in ET.parse(plot).iter("{http://www.w3.org/2000/svg}title"))
        for found in (found for found in rows if found["measure"] == measure):
            name, value, context = NAMES[found["method"]], found["value"], found["context"]
            said = f"{name}: {value:.4f}" if value < 1000 else f"{name}: {value:,.0f}"
            at = f"{context:,}" if measure != "train_tokens_per_s" else f"{context // 1024}K × {found['sequences']}"
            assert shown[f"{said} at {at}"] >= 1


def test_bars_begin_at_zero_and_say_what_was_computed_again() -> None:
    rows = [row("train_tokens_per_s", "e2e", 12000.0, recompute="sqrt"), row("train_tokens_per_s", "full", 24000.0)]
    (chart,) = bench_charts([*rows, row("prefill_ms_per_1k", "e2e", 1.0)], "training")
    assert (chart.bars, chart.title, chart.ticks) == (True, "3B", {0.0: "8K × 1"})
    assert [line.notes for line in chart.lines] == [["12K*"], ["24K"]]
    assert "* computes again" in chart.x_label
    one, other = (part for part in draw([chart]).parts if isinstance(part, Stroke) and part.kind == "bar")
    heights = [max(y for _, y in bar.points) - min(y for _, y in bar.points) for bar in (one, other)]
    assert heights[1] == pytest.approx(2 * heights[0])
    assert max(x for x, _ in one.points) < min(x for x, _ in other.points)


def test_a_page_follows_from_its_rows() -> None:
    machine = Machine("a card", "bfloat16 8192³", 8e14, 4e12)
    flops, full_flops = 2.95e10, 2.1e10
    e2e = row("train_tokens_per_s", "e2e", 12000.0, recompute="sqrt")
    full = row("train_tokens_per_s", "full", 20000.0)
    assert training_flops(recipe("3b").model, 8192, "end-to-end") == pytest.approx(flops, rel=0.05)
    assert training_flops(recipe("3b", "full").model, 8192, "static") == pytest.approx(full_flops, rel=0.05)
    assert seconds_per_token(e2e) == 1 / 12000
    assert times_full_attention(e2e, [e2e, full]) == pytest.approx(20 / 12)
    assert times_full_attention(e2e, [e2e]) is None
    assert share_of_peak(e2e, machine) == pytest.approx(
        training_flops(recipe("3b").model, 8192, "end-to-end") * 12000 / 8e14
    )
    prefill = row("prefill_ms_per_1k", "full", 75.0, context=131072)
    assert seconds_per_token(prefill) == pytest.approx(0.075 / 1024)
    assert share_of_peak(prefill, machine) == pytest.approx(
        reading_flops(recipe("3b", "full").model, 131072, scored=False) * 1024 / 0.075 / 8e14
    )
    decode = row("decode_tokens_per_s", "e2e", 300.0)
    config = recipe("3b").model
    read_bytes = 2 * (config.num_parameters + 2 * 32 * 8192 * 2560)
    assert share_of_peak(decode, machine) == pytest.approx(read_bytes * 300 / 4e12)

    outcome = Outcome(machine, rows=[full, e2e, prefill, decode], verdicts=[GateResult("gradients", True, "fine")])
    outcome.failures.append((Case("prefill", "e2e", "3b", 8192), "does not fit into memory"))
    page = markdown(outcome, command="longread bench", hardware={"gpus": ["a card"]})
    line = next(line for line in page.splitlines() if "| TTT-E2E | 12,000 |" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    share = share_of_peak(e2e, machine)
    work = training_flops(config, 8192, "end-to-end") / 1e9
    assert cells[:4] == ["3b", "8,192", "1", "TTT-E2E"]
    assert cells[7:] == ["1.67", f"{work:.3g}", f"{100 * share:.1f}", f"{1 / share:.2f}", "10.0", "sqrt"]
    assert "- gradients: right, fine" in page
    assert "- prefill 3b e2e 8192: does not fit into memory" in page
    assert "800 TFLOP/s" in page
    assert "this peak is none" not in page
    outcome.machine = Machine("a busy card", "bfloat16 8192³", 1e14, 4e12)
    assert "this peak is none" in markdown(outcome, command="longread bench", hardware=None)
    assert outcome.machine.or_better(machine).flops == 8e14


def test_gaps_are_what_no_kernel_covers() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    names = {"nvjet_hsh_128x256": 3.0, "_key_second_kernel": 2.0, "_norm_backward": 1.0, "_sgd_update": 0.5}
    text = describe(Counter(names), Counter(dict.fromkeys(names, 1)), 6.5, 10.0)
    assert "| matrix products | 3.00 | 30 |" in text
    assert "| gaps | 3.50 | 35 |" in text
    assert [kind_of(name) for name in names] == ["matrix products", "attention", "norms and gates", "optimizer"]
    assert kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma") == "attention"
    assert kind_of("_nll_forward") == "cross-entropy"
