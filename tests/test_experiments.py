"""Pages of experiments say what the figures beside them say."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from experiments import corpus
from experiments.equal import EXACT, RUNS, network
from experiments.page import Table, as_stored, with_tables, write
from experiments.pages import KINDS, boxed, context, equal, meta
from experiments.pages.__main__ import CARD, HERE, OTHERS, PAGES, again
from experiments.plan import Job, Plan, jobs
from experiments.results import Results
from experiments.run import Runner, Running, add

from longread.cli.arguments import changed
from longread.data import TokenDataset
from longread.recipes import recipe
from longread.tokenizer import train_bpe


def test_every_table_is_what_its_figures_make_it() -> None:
    pages = again()
    assert len(pages) >= len(PAGES) + len(OTHERS) + 1, "a folder of results for each, and the model card"
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"python -m experiments.pages changes {page}"


def _figures(slug: str) -> Any:
    (folder,) = HERE.glob(f"*_{slug}")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_another_figure_makes_another_table() -> None:
    figures = _figures(boxed.SLUG)
    figures["SWA twin, books"]["8–16K"] += 1.0
    before, after = (list(boxed.tables(f)) for f in (_figures(boxed.SLUG), figures))
    assert before[0].text != after[0].text
    assert before[1].text == after[1].text
    assert with_tables(CARD, after) != CARD.read_text(encoding="utf-8")


def test_differences_are_of_equal_seeds() -> None:
    figures = _figures(context.SLUG)
    figures["loss, books"] = {
        "e2e": {"0": {"1": 3.0, "32": 2.0}, "1": {"1": 5.0, "32": 1.0}},
        "swa": {"0": {"1": 3.5, "32": 3.0}},
    }
    rows = next(table.rows for table in context.tables(figures) if "differences" in table.caption)
    assert rows == [["TTT-E2E − SWA", "−0.500 (1)", "", "", "", "", "−1.000 (1)"]]


def test_losses_at_equal_operations_lie_between_two_runs() -> None:
    """Twice the operations are half of the way to four times the tokens, by the logarithm."""
    figures = _figures(meta.SLUG)
    figures |= {"SWA, tokens and operations at 1K": [1, 1.0], "SWA, 54 % longer, tokens and operations at 1K": [4, 4.0]}
    figures |= {"SWA, operations to 1K": 1.0, "exact, operations to 1K": 2.0}
    figures["SWA, books"] = {meta.READ: {"0": {"1": 4.0, "2": 9.0}, "1": {"1": 4.5}}}
    figures["SWA, 54 % longer, books"] = {meta.READ: {"0": {"1": 3.0}}}
    figures["exact, books"] = {meta.READ: {"0": {"1": 3.75}}}
    assert meta.at_operations_of(figures, "swa", "e2e", "books") == {0: {1: 3.5}}
    assert meta.row_at_equal_operations(figures, "swa", "e2e", "e2e", "books")[1] == "−0.250 (1)"


def test_operations_of_the_small_recipes() -> None:
    """Of a sequence of 1K: as README and the page of meta-gradients say them."""
    costs = meta.operations_of_a_sequence(1)
    of_swa = {method: round(costs[method] / costs["swa"], 2) for method in ("e2e", "meta-first-order", "naive")}
    assert of_swa == {"e2e": 1.35, "meta-first-order": 1.12, "naive": 1.0}
    assert _figures(meta.SLUG)["exact, operations to 1K"] == pytest.approx(64_000 * costs["e2e"], rel=1e-5)


def test_a_table_is_found_by_its_caption(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    losses, others = "Losses:\n\n| | a |\n|---|--:|\n| x | 1 |", "Others:\n\n| | b |\n|---|--:|\n| y | 2 |"
    page.write_text(f"# Title\n\n{losses}\n\nText.\n\n{others}\n")
    made = [Table("Others:", ["", "b"], [["y", "3"], ["z", "4"]]), Table("Losses:", ["", "a"], [["x", "9"]])]
    assert with_tables(page, made) == (
        "# Title\n\nLosses:\n\n|  | a |\n|---|--:|\n| x | 9 |\n\nText.\n\n"
        "Others:\n\n|  | b |\n|---|--:|\n| y | 3 |\n| z | 4 |\n"
    )
    with pytest.raises(SystemExit, match="no table below 'Missing:'"):
        with_tables(page, [Table("Missing:", ["", "a"], [])])


def test_figures_are_stored_to_six_digits_with_keys_of_text() -> None:
    assert as_stored({1: {"x": 1.23456789}, "y": (2, None, "z")}) == {"1": {"x": 1.23457}, "y": [2, None, "z"]}


class _AllDone(Results):
    """As if every job had been run: losses are made up."""

    def reading(self, job: str, what: str, reading: str | None = None) -> dict[str, Any] | None:
        def score(loss: float) -> dict[str, Any]:
            return {"nats_per_token": {"mean": loss}}

        if reading == ("learning" if "swa" in job or "full" in job else "static"):
            return None
        ends = [0, 1, 7, 15, 23, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
        bins = [
            {"start": a, "end": b, "score": score(3.0 + 1.0 / b + 0.1 * (reading == "frozen"))}
            for a, b in itertools.pairwise(ends)
        ]
        gain = {"mean": 0.1, "low": 0.05, "high": 0.15, "n": 3}
        return {
            "loss": score(3.0 + len(job) / 100),
            "curve": bins,
            "by_position": bins,
            "at_index": [{"start": i, "score": score(3.5)} for i in (1, 7, 127)],
            "by_context_length": [{"context_length": n, "gain_over_frozen": gain} for n in (1024, 65536)],
            "health": dict.fromkeys(boxed.HEALTH, 1.0),
        }

    def loss_before(self, job: str, extension: str, what: str) -> float | None:
        return 3.2

    def training(self, job: str) -> list[tuple[float, float]]:
        longer = 1.5 if "longer" in job else 1.0
        return [(655_360.0 * longer * step, 8.0 - 0.04 * step) for step in range(1, 101)]


@pytest.mark.parametrize("module", PAGES, ids=lambda module: module.SLUG)
def test_a_new_round_makes_a_page_whose_tables_can_be_made_again(module: Any, tmp_path: Path) -> None:
    verdict = {
        "writer": "a",
        "reading": "static",
        "seconds": 1.0,
        "repeated": {"mean": 0.0},
        "continuation": {"nats_per_token": {"mean": 4.0, "low": 3.9, "high": 4.1}},
        "by_position": [{"start": s, "end": s + 8, "score": {"nats_per_token": {"mean": 4.0}}} for s in (0, 8)],
    }
    share = {"mean": 0.5, "low": 0.1, "high": 0.9, "n": 4}
    accuracy = [{"variant": "S-NIAH-1", "context_length": 1024, "inside_window": share, "outside_window": None}]
    norms = [{"grad_norm": 1.0, "inner_grad_norm": 0.5, "inner_clipped": 0.2}]
    found = _AllDone(
        evaluations={name: {} for name in (*module.NEEDS, "twin-swa-32")}
        | {"judge": {"written": {"judge": "b", "documents": 2, "prompt_tokens": 8, "verdicts": [verdict]}}}
        | {"judge-a": {"judge": {"judge": "b", "prompt_tokens": 8, "verdicts": [verdict]}}}
        | {"needle-a": {"needle": {"results": [{"model": "a", "reading": "static", "accuracy": accuracy}]}}},
        metrics=dict.fromkeys(module.NEEDS, norms),
        runs={("e2e-s1", f"{kind}-1"): {1: 3.0} for kind in KINDS},
    )
    stored = as_stored(module.gather(found))
    tables = list(module.tables(stored))
    drawn = stored if hasattr(module, "merge") else found
    write(tmp_path, module.HEADING, stored, tables, plots := list(module.plots(drawn)))
    page = tmp_path / "README.md"
    text = page.read_text(encoding="utf-8")
    assert all(table.rows and table.text in text for table in tables)
    assert {path.name for path in tmp_path.glob("*.svg")} == set(re.findall(r"\((\w+\.svg)\)", text))
    for plot in plots:
        drawing = set(ElementTree.parse(tmp_path / f"{plot.name}.svg").getroot().itertext())
        assert all(chart.lines and chart.title in drawing for chart in plot.charts)
        assert {line.label for chart in plot.charts for line in chart.lines} <= drawing
    page.write_text(re.sub(r"(?<=\| )[\d.+−]+", "9.9", text), encoding="utf-8")
    assert page.read_text(encoding="utf-8") != text
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert with_tables(page, module.tables(kept)) == text


def test_of_two_archives_the_later_counts_and_the_page_says_how_far_it_moved(tmp_path: Path) -> None:
    """A job that is in both; one that only the first has; and exact, of which what another page has counts."""
    first = {("first-order-equal-s1", "books-1"): 3.5, ("first-order-equal-s1-32", "books-32"): 3.25}
    archives = [first, {("first-order-equal-s1", "books-1"): 3.625, ("e2e-s1", "code-1"): 9.0}]
    found = Results()
    for number, losses in enumerate(archives):
        found.load(_archive(tmp_path / f"{number}.tar.xz", losses))
    figures = as_stored(equal.gather(found))
    kept = _figures(meta.SLUG)["exact, code"][meta.READ]["1"]["1"]
    assert equal.losses_of(figures, "first-order-equal", "books") == {1: {1: 3.625, 32: 3.25}}
    assert equal.losses_of(figures, "e2e", "code")[1][1] == kept
    assert equal.rows_again(figures) == [
        ["first-order, seed 1", "+0.125", "", "", "", "", ""],
        ["exact, seed 1", "", "", "", f"{9.0 - kept:+.3f}", "", ""],
    ]


def _archive(path: Path, losses: dict[tuple[str, str], float]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for (name, what), loss in losses.items():
            result = {"reading": "learning", "loss": {"nats_per_token": {"mean": loss}}}
            add(tar, f"results/{name}/{what}.json", json.dumps({"results": [result]}).encode())
    return path


def test_steps_at_equal_operations_spend_what_exact_spends() -> None:
    """At every context, the pre-training included, and with as many parameters, at both sizes."""
    exact = {False: EXACT, True: next(run for run in RUNS if run.name == "large-e2e")}
    spent = {large: {L: n for L, _, n in equal.training(run)} for large, run in exact.items()}
    for run in RUNS:
        parameters = network("e2e", run.large).num_parameters
        assert network(run.method, run.large).num_parameters == pytest.approx(parameters, rel=1e-3)
        if run.equal == "operations":
            assert {L: n for L, _, n in equal.training(run)} == pytest.approx(spent[run.large], rel=1e-3)
    assert network("e2e", True).num_parameters == pytest.approx(35e6, rel=0.02)
    assert spent[True][1] / spent[False][1] == pytest.approx(4.54, abs=0.01)


def test_the_plan_trains_those_steps_with_those_settings(tmp_path: Path) -> None:
    found = {job.name: job for job in jobs(Plan(tmp_path, tmp_path))}
    for run in RUNS:
        for seed, (L, tokens, _) in itertools.product(run.seeds, equal.training(run)):
            job = found[f"{run.name}-s{seed}" + (f"-{L}" if L > 1 else "")]
            extension = tokens - (found[job.needs[0]].tokens if job.needs else 0)
            assert (job.tokens, job.context, job.method) == (extension, L, run.method)
            arguments = job.commands[0].arguments
            sets = [value for name, value in itertools.pairwise(arguments) if name == "--set"]
            assert set(run.settings(L > 1)) <= set(sets)
            assert ("meta_gradient=first-order" in sets) == (run.meta_gradient == "first-order")
            config = changed(recipe("small", run.method), sets)
            assert dataclasses.replace(config.model, rope_base=5e5) == network(run.method, run.large)


def test_a_corpus_unpacks_to_what_was_encoded(tmp_path: Path) -> None:
    texts = [[(f"{kind}-{i}.txt", f"{kind} {i} of a few words. ".encode() * 50) for i in range(3)] for kind in KINDS]
    tokenizer = train_bpe((text.decode() for kind in texts for _, text in kind), 300)
    corpus.pack_tokens(texts, tokenizer, packed := tmp_path / "packed")
    (made := tmp_path / "train").mkdir()
    for path in packed.iterdir():
        if path.suffix == ".xz":
            corpus.decompress(path, made / path.stem)
        else:
            shutil.copyfile(path, made / path.name)
    dataset = TokenDataset.open(made)
    dataset.verify()
    names = [name for kind in texts for name, _ in kind]
    assert [Path(dataset.document_name(i)).name for i in range(dataset.num_documents)] == names
    assert tokenizer.decode(dataset.document(4).tolist()).encode().endswith(texts[1][1][1])


def test_a_corpus_like_that_of_the_boxed_model() -> None:
    books, packages = corpus.sources_of(CARD.parent)
    assert len(books) == 328
    assert {"python", "click", "numcodecs", "yaml"} <= packages
    assert len(packages) == 56


def _runner(tmp_path: Path, **options: Any) -> Runner:
    given = {"work": tmp_path, "out": tmp_path, "packed": tmp_path, "seconds": 1e5, "per_gpu": 7, "first_gpu": None}
    runner = Runner(argparse.Namespace(**given | {"first_gpu_after": 0.0, "last": False} | options))
    runner.gpus = 2
    return runner


def test_the_first_gpu_is_left_to_others_at_first(tmp_path: Path) -> None:
    runner = _runner(tmp_path, first_gpu_after=1000.0)
    assert (runner.free_gpu(3), runner.free_gpu(9)) == (1, 1)
    runner.running.append(Running(Job("large", 0, ()), 1, 1, 0.0))
    assert (runner.free_gpu(3), runner.free_gpu(7)) == (1, None)
    runner.started -= 1000.0
    assert runner.free_gpu(7) == 0


def test_a_job_gets_a_gpu_among_those_that_may_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    runner = _runner(tmp_path)
    monkeypatch.setattr(runner, "launch", lambda name, gpu: given.append(gpu) or 0)
    for visible in (None, "6", "3,5", "GPU-1a,GPU-2b"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        for gpu in range(2 if visible != "6" else 1):
            runner.start(Job("any", 0, ()), gpu)
    assert given == ["0", "1", "6", "3", "5", "GPU-1a", "GPU-2b"]


def test_what_is_nearly_done_still_starts_at_the_end(tmp_path: Path) -> None:
    job = Job("long", 0, (), tokens=10**9, context=1)
    runner = _runner(tmp_path, seconds=25 + 1.2 * job.estimated_seconds, last=True)
    assert not runner.fits(job)
    runner.state["jobs"]["long"] = {"status": "interrupted", "seconds": 0.5 * job.estimated_seconds}
    assert runner.fits(job)
