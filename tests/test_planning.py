"""Plans of training on several GPUs: bytes and seconds by hand, what scales, what is refused, and the command."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from longread.bench import read_rows
from longread.cli import estimate, main
from longread.config import OptimizerConfig, Parallelism, RunConfig, UserError
from longread.flops import recomputed_flops, training_flops
from longread.model import Transformer
from longread.outer_loop import graph_bytes, num_trained
from longread.parallel.rows import BUCKET_BYTES
from longread.planning import GPUS, Layout, Plan, gpu_named, load_of, plan_training, state_bytes, step_seconds
from longread.planning.measured import COPYING, MEASURED, kind_of, nearest, utilisation
from longread.planning.memory import PROCESS, groups_of
from longread.planning.timing import LATENCY, LINK_SHARE, NETWORK_SHARE, collective_seconds
from longread.recipes import recipe
from tests.tiny import config as tiny

H200 = GPUS["h200"]
GIB = 2**30


def a_run(batch_size: int = 8, context: int = 40, **changes: Any) -> RunConfig:
    """Of the smallest network: 4 blocks of width 16, two of which learn, F 24."""
    fields: dict[str, Any] = {"name": "r", "model": tiny(), "optimizer": OptimizerConfig(lr=1.0), "steps": 100}
    return RunConfig(**{**fields, "batch_size": batch_size, "context_length": context, **changes})


def laid(gpus: int, nodes: int = 1, update: Any = "shared", state: int = 1) -> Layout:
    return Layout(gpus, nodes, Parallelism(update=update, state=state))


def planned(name: str, layout: Layout, **changes: Any) -> Plan:
    return plan_training(dataclasses.replace(recipe(name), **changes), layout, H200)


# What is measured, and what follows for others.


def test_measured_steps_are_those_of_the_repository() -> None:
    rows = read_rows(Path(__file__).parent.parent / "benchmarks" / "results" / "h200.json")
    names = ("size", "method", "context", "sequences", "value", "recompute")
    found = {tuple(row[name] for name in names) for row in rows if row["measure"] == "train_tokens_per_s"}
    assert found == set(MEASURED)
    assert {row["versions"]["device"] for row in rows} == {"NVIDIA H200"}


def test_each_measured_step_is_predicted_by_the_others() -> None:
    """Of the same size within 10 %, of another within 19 %."""
    for row in MEASURED:
        parameters = recipe(row.size, row.method).model.num_parameters
        own = nearest(parameters, row.context, row.method)
        assert own.row == row
        other = nearest(parameters, row.context, row.method, leave_out=row)
        assert other.row != row
        assert other.share / own.share == pytest.approx(1, abs=0.10 if other.row.size == row.size else 0.19)


@pytest.mark.parametrize("row", MEASURED[:8], ids=lambda row: f"{row.size}-{row.context}")
def test_a_step_on_one_gpu_takes_what_was_measured(row: Any) -> None:
    name, context = (row.size, {}) if row.context == 8192 else (f"{row.size}-extend", {"context_length": row.context})
    config = dataclasses.replace(recipe(name, **context), batch_size=row.sequences, recompute=row.recompute)
    plan = plan_training(config, Layout(), H200)
    assert plan.tokens_per_second == pytest.approx(row.tokens_per_s, rel=1e-6)
    assert plan.load.recompute == row.recompute


def test_a_network_is_measured_by_its_kind() -> None:
    assert [kind_of(recipe("3b", method)) for method in ("e2e", "swa", "naive", "full", "hybrid")] == [
        *("e2e", "swa", "swa", "full", "full")
    ]
    assert not utilisation(recipe("1.3b")).is_far
    assert utilisation(recipe("small")).is_far
    with pytest.raises(UserError, match="mixer mamba2 cannot be planned: its operations are not counted"):
        utilisation(recipe("3b", "mamba2"))


def test_a_gpu_is_told_in_bytes_of_one_direction() -> None:
    assert H200.memory == pytest.approx(139.8 * GIB, rel=0.003)  # as programs saw it in benchmarks/results
    assert (H200.flops, H200.memory_bandwidth) == (989.4e12, 4.8e12)
    assert (H200.link, H200.network) == (450e9, 50e9)
    for gpu in GPUS.values():
        assert gpu.source.startswith("https://www.nvidia.com/")
        assert gpu.network < gpu.link < gpu.memory_bandwidth
    with pytest.raises(UserError, match="there is no GPU 'h300' in the table; choose from a100, h100, h200, b200"):
        gpu_named("h300")


# Memory.


def test_state_of_one_gpu_by_hand() -> None:
    """4 bytes of weights, 4 of gradients, 8 of moments; by itself it sends nothing."""
    N = Transformer(tiny()).config.num_parameters
    assert state_bytes(a_run(), Layout()) == (4 * N, 4 * N, 8 * N, 0, PROCESS, 0)


def test_state_of_four_gpus_by_hand() -> None:
    N = sum(p.numel() for p in Transformer(tiny()).parameters())
    packed = BUCKET_BYTES  # of more gradients than there are
    shared = state_bytes(a_run(), laid(4))
    assert shared == (4 * N, 4 * N + 4 * N // 4, 8 * N // 4, 0, PROCESS + packed + packed // 4, 0)
    assert state_bytes(a_run(), laid(4, 16)) == shared  # nodes repeat each other
    assert state_bytes(a_run(), laid(4, update="replicated")) == (4 * N, 8 * N, 8 * N, 0, PROCESS + 2 * packed, 0)
    assert state_bytes(a_run(batch_size=8), laid(1, 4)) == state_bytes(a_run(), laid(4, update="replicated"))


def test_state_that_is_fully_sharded_by_hand() -> None:
    """A share of everything; gathered, everything but the prefix, and one block of it."""
    model = Transformer(tiny())
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    N = sum(p.numel() for p in model.parameters())
    root = N - sizes[0] - sizes[1]
    assert groups_of(tiny()) == (2, sizes[0], root)
    found = state_bytes(a_run(), laid(4, update="fully-sharded"))
    assert found == (N, N, 2 * N, 8 * (root + sizes[0]), PROCESS, 0)
    one = state_bytes(a_run(), laid(1, update="fully-sharded"))
    assert one == state_bytes(a_run(), Layout())
    assert groups_of(tiny(num_suffix_blocks=4)) == (0, 0, N + 2 * (3 * 16 * 24 + 2 * 16))


def test_a_suffix_alone_has_gradients_and_moments_of_its_own() -> None:
    N, trained = tiny().num_parameters, num_trained(tiny(), 2)
    found = state_bytes(a_run(trained_blocks=2), laid(2))
    assert found[:3] == (4 * N, 4 * trained + 4 * trained // 2, 8 * trained // 2)


def test_state_parallel_cuts_fast_mlps_and_their_activations() -> None:
    config, layout = a_run(), laid(4, state=2)
    cut = layout.local(config.model)
    assert cut.num_fast_weights == config.model.num_fast_weights // 2
    assert cut.num_parameters == config.model.num_parameters - config.model.num_fast_weights // 2
    assert state_bytes(config, layout).weights == 4 * config.model.num_parameters  # each GPU keeps all and uses a part
    assert state_bytes(config, layout).moments == 8 * config.model.num_parameters // 4
    assert (
        load_of(config, layout, GIB * 2).memory.activations
        == (graph_bytes(cut, "end-to-end", batch_size=4, context_length=40, itemsize=2, kernels=True)["none"])
    )


def test_as_much_is_computed_at_a_time_as_fits() -> None:
    load = load_of(recipe("3b"), laid(8), H200.memory)
    assert (load.micro_batch_size, load.recompute, load.spare) == (1, "none", True)
    small = load_of(recipe("125m"), laid(8), H200.memory)
    assert (small.micro_batch_size, small.recompute) == (8, "none")
    long = load_of(recipe("3b-extend"), laid(8), H200.memory)
    assert (long.micro_batch_size, long.recompute, long.spare) == (1, "all", False)
    swa = load_of(recipe("3b-extend", "swa", context_length=32768), laid(8), GIB * 80)
    assert swa.recompute == "24-blocks"
    forced = load_of(dataclasses.replace(recipe("3b", "swa"), recompute="sqrt"), laid(8), H200.memory)
    assert forced.recompute == "blocks"  # the static loss has no other
    asked = load_of(dataclasses.replace(recipe("3b"), micro_batch_size=4), laid(8), H200.memory)
    assert asked.micro_batch_size == 4
    with pytest.raises(UserError, match="32 sequences at a time do not divide the 16 of each GPU; choose a divisor"):
        load_of(dataclasses.replace(recipe("3b"), micro_batch_size=32), laid(8), H200.memory)


# Time.


def test_seconds_of_a_collective_by_hand() -> None:
    assert collective_seconds(8e9, 1, 450e9) == 0
    assert collective_seconds(8e9, 4, 450e9, 3) == pytest.approx(6e9 / 450e9 + 3 * 2 * LATENCY)


def test_seconds_of_a_step_by_hand() -> None:
    """760M at 8K, 64 sequences on 2 nodes of 4: 8 each."""
    config, layout = recipe("760m"), laid(4, 2)
    load = load_of(config, layout, H200.memory)
    seconds, N = step_seconds(config, layout, H200, load), config.model.num_parameters
    work = training_flops(config.model, 8192, "end-to-end")
    work += recomputed_flops(config.model, 8192, "end-to-end", load.recompute)
    assert seconds.compute == pytest.approx(work * 8 * 8192 / (utilisation(config).share * 989.4e12))
    assert seconds.update == pytest.approx(28 * N / 4 / (COPYING * 4.8e12))
    pieces = -(-4 * N // BUCKET_BYTES)
    assert seconds.within == pytest.approx(2 * (4 * N * 3 / 4 / (LINK_SHARE * 450e9) + 2 * pieces * LATENCY))
    assert seconds.between == pytest.approx(2 * (N / 2 / (NETWORK_SHARE * 50e9) + pieces * LATENCY))
    assert seconds.state_parallel == 0
    assert seconds.total == pytest.approx(sum(seconds))
    assert seconds.efficiency == pytest.approx((seconds.compute + seconds.update) / seconds.total)


def test_weights_travel_more_often_where_they_are_fully_sharded() -> None:
    """Each micro-batch gathers everything, and the prefix twice; gradients come together once."""
    config, layout = dataclasses.replace(recipe("760m"), micro_batch_size=4), laid(8, update="fully-sharded")
    seconds = step_seconds(config, layout, H200, load_of(config, layout, H200.memory))
    blocks, block, root = groups_of(config.model)
    size = 4 * (root + 2 * blocks * block) + 4 * config.model.num_parameters
    waits = 3 * LATENCY * (1 + 2 * blocks + 1 + blocks)
    assert seconds.within == pytest.approx(2 * (size * 7 / 8 / (LINK_SHARE * 450e9) + waits))


def test_state_parallel_sums_what_its_gpus_share() -> None:
    """3B at 128K over 4: 128 mini-batches, 8 fast MLPs, each summed four times, with two norms; where a step runs again
    six times and three."""
    config, layout = recipe("3b-extend"), laid(8, state=4)
    load = load_of(config, layout, H200.memory)
    seconds = step_seconds(config, layout, H200, load)
    assert load.recompute == "114-steps"
    steps, again = 8 * 128, 8 * 114
    once = 2 * (1024 * 2560 * 2 * 3 / 4 / (LINK_SHARE * 450e9) + 2 * LATENCY)
    norm = 2 * (8 * 3 / 4 / (LINK_SHARE * 450e9) + 2 * LATENCY)
    assert seconds.state_parallel == pytest.approx((4 * steps + 2 * again) * 8 * once + (2 * steps + again) * norm)


def test_twice_the_gpus_halve_what_each_computes() -> None:
    two, four, eight = (planned("3b", laid(gpus)).seconds for gpus in (2, 4, 8))
    assert two.compute == pytest.approx(2 * four.compute) == pytest.approx(4 * eight.compute)
    assert two.within < four.within < eight.within < 2 * two.within  # (n − 1) / n
    assert two.between == four.between == 0
    nodes = [planned("3b", laid(8, nodes)) for nodes in (1, 2, 4)]
    assert nodes[0].seconds.within == nodes[1].seconds.within == nodes[2].seconds.within
    assert 0 < nodes[1].seconds.between < nodes[2].seconds.between
    assert nodes[0].tokens_per_second < nodes[1].tokens_per_second < 2 * nodes[0].tokens_per_second
    assert nodes[0].seconds.efficiency > nodes[1].seconds.efficiency > nodes[2].seconds.efficiency > 0.9


def test_the_slower_gpu_takes_longer() -> None:
    config = recipe("760m")
    h200, h100, a100 = (plan_training(config, laid(8), GPUS[name]).seconds for name in ("h200", "h100", "a100"))
    assert h100.update == pytest.approx(h200.update * 4.8 / 3.35)
    assert a100.compute / h200.compute == pytest.approx(989.4 / 312, rel=0.3)  # it may have to compute more again
    assert a100.within > h100.within == h200.within


def test_days_and_cost_are_those_of_all_steps() -> None:
    plan = planned("3b", laid(8, 2))
    step = plan.seconds.total
    assert plan.tokens_per_step == 2**20
    assert plan.tokens_per_day == pytest.approx(2**20 * 86_400 / step)
    assert plan.days == pytest.approx(52_000 * step / 86_400)
    assert plan.cost(2.5) == pytest.approx(2.5 * 16 * 52_000 * step / 3600)
    assert plan.cost(5.0) == 2 * plan.cost(2.5)


# What cannot be.


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (laid(3), r"a batch of 8 sequences does not divide among 3 data ranks \(3 GPUs\); use --batch-size 9, fewer"),
        (laid(8, 3, state=2), r"among 12 data ranks \(24 GPUs / 2\); use --batch-size 12, fewer GPUs, or a higher"),
        (laid(5, state=5), "5 GPUs do not divide the 24 hidden units of the fast MLPs; choose a divisor"),
    ],
)
def test_what_does_not_divide_is_refused(layout: Layout, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_of(a_run(), layout, GIB)


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="3 GPUs that share sequences do not divide the 8 of a node"):
        laid(8, state=3)
    with pytest.raises(UserError, match="nodes is 0; it must be at least 1"):
        laid(8, 0)
    with pytest.raises(UserError, match="1000000 nodes of 8 GPUs are more than 1048576 GPUs; lower them"):
        laid(8, 10**6)
    with pytest.raises(UserError, match="divides fast MLPs, and this model has none"):
        laid(2, state=2).local(tiny(num_suffix_blocks=0))


def refused(name: str, layout: Layout, gib: float = 141 * 0.99, **changes: Any) -> str:
    gpu = dataclasses.replace(H200, memory=gib * GIB)
    with pytest.raises(UserError) as error:
        plan_training(dataclasses.replace(recipe(name), **changes), layout, gpu)
    return str(error.value)


def options_of(said: str) -> dict[str, float]:
    """The changes that would be enough alone, and the GiB that each would need."""
    choices = said.partition("); ")[2].removesuffix(" would fit").split(" or ")
    return {option.strip(): float(size.removesuffix(" GiB)")) for option, size in (c.split(" (") for c in choices)}


def test_a_run_that_does_not_fit_says_what_would() -> None:
    said = refused("3b-extend", laid(4, update="replicated"))
    assert said.startswith(
        "131,072 tokens with update replicated on 4 × h200 need 143.8 GiB of a GPU's 139.6 GiB by an"
    )
    found = options_of(said)
    assert list(found) == ["--update shared", "--state-parallel 2", "--context-length 65536", "--only suffix"]
    assert max(found.values()) < 139.6
    assert found["--update shared"] == pytest.approx(planned("3b-extend", laid(4)).load.memory.total / GIB, abs=0.1)
    alone = options_of(refused("3b-extend", laid(1), gib=125))
    assert list(alone) == ["--gpus 4", "--context-length 65536", "--only suffix"]
    asked = options_of(refused("3b-extend", laid(8), micro_batch_size=2))
    assert next(iter(asked)) == "--train 1"
    kept = options_of(refused("3b-extend", laid(8), recompute="none"))
    assert next(iter(kept)) == "--recompute auto"


def test_changes_that_fit_only_together_are_named_together() -> None:
    said = refused("3b-extend", laid(8), gib=24)
    assert said.endswith("; --update fully-sharded --context-length 2048 together would fit (23.3 GiB)")
    said = refused("3b-extend", laid(4), gib=60, recompute="none")
    assert "; --recompute auto --update fully-sharded --gpus 8 --context-length " in said
    least = refused("3b-extend", laid(8), gib=8)
    assert least.endswith(
        "; take a GPU with more memory or a smaller model, as even with --update fully-sharded --context-length 1024 "
        "--only suffix it needs 15.6 GiB"
    )


# The command.


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert main(["estimate", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:60].strip(): line[60:].strip() for line in lines}


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "3b", "--train", "--gpus", "8", "--nodes", "2", "--price", "2.5")
    plan = planned("3b", laid(8, 2))
    assert found["weights"] == f"{4 * plan.config.model.num_parameters / GIB:.2f} GiB"
    assert found["a GPU in all, of 139.6 GiB"] == f"{plan.load.memory.total / GIB:.2f} GiB"
    assert found["a step in all"] == f"{plan.seconds.total:.3f} s"
    assert found["travelling within a node"] == f"{1e3 * plan.seconds.within:.3f} ms"
    assert found["tokens per day"] == f"{round(plan.tokens_per_day):,}"
    assert found["the run, 52,000 steps"] == f"{plan.days:.1f} days"
    assert found["the run, 16 GPUs at 2.5 USD an hour"] == f"{plan.cost(2.5):,.0f} USD"
    first, *_, last = found
    assert first.startswith("3b-e2e on 2 nodes of 8 × h200, update shared: 128 × 8,192 t")
    assert last.startswith("Computing at 39 % of the peak, as 3b e2e at 8,192 tokens did")


def test_programs_read_the_plan_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    options = "760m-extend", "--train", "1", "--gpus", "4", "--context-length", "32768", "--batch-size", "8"
    more = "--update", "fully-sharded", "--gpu", "h100", "--memory", "100", "--price", "1", "--quiet"
    assert main(["estimate", *options, *more, "--json", str(path)]) == 0
    assert capsys.readouterr().out == ""
    found = json.loads(path.read_text())
    rows = found.pop("rows")
    assert found == {
        "format": "longread-estimate/1",
        "precision": "bfloat16",
        "context_length": 32768,
        "gpu": "h100",
        "gpus": 4,
        "nodes": 1,
        "update": "fully-sharded",
        "state_parallel": 1,
        "batch_size": 8,
        "micro_batch_size": 1,
        "recompute": "5-blocks",
        "steps": 725,
    }
    total = next(row["bytes"] for row in rows if row["what"] == "a GPU in all, of 100.0 GiB")
    assert total == sum(row["bytes"] for row in rows if "bytes" in row) / 2
    step = next(row["seconds"] for row in rows if row["what"] == "a step in all")
    assert next(row["USD"] for row in rows if "USD" in row) == pytest.approx(4 * 725 * step / 3600)
    remarks = [row["remark"] for row in rows if "remark" in row]
    assert any(remark.startswith("No h100 was measured") for remark in remarks)


def test_remarks_say_how_far_a_plan_can_be_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "3b-extend", "--train", "--gpus", "8"]) == 0
    assert "Less than a fifth of the memory is left free" in capsys.readouterr().out
    assert main(["estimate", "toy", "--train", "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "Nothing of about this size was measured" in out
    assert "exact meta-gradient" not in out
    assert main(["estimate", "longread-small", "--train", "--gpus", "2", "--only", "suffix"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("adapt-e2e on 2 × h200, update shared: 8 × 8,192 tokens a step")
    assert "All of it is for the exact meta-gradient; a model is adapted first-order, which takes less." in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["3b", "--train", "1", "--nodes", "2"], "--nodes is about a plan; give --train and --gpus too"),
        (["3b", "--state-parallel", "2"], "--state-parallel is about a plan; give --train and --gpus too"),
        (["3b", "--gpus", "2"], "--gpus is about training; give --train too"),
        (["3b", "--train"], "--train has no number; say how many sequences at a time, or give --gpus for a plan"),
        (["3b", "--train", "--gpus", "2", "--precision", "float32"], "--precision float32 cannot be planned"),
        (["3b", "--train", "4096", "--gpus", "2"], "--train 4096 does not divide the 128 sequences of a step; give a"),
        (["3b", "--train", "--gpus", "2", "--price", "0"], "--price is 0; give USD, above 0 and below 1,000,000"),
        (["3b", "--train", "--gpus", "2", "--price", "nan"], "--price is nan; give USD, above 0"),
        (["3b", "--train", "--gpus", "2", "--gpu", "h300"], "there is no GPU 'h300' in the table"),
        (["3b", "--train", "--gpus", "3"], "a batch of 128 sequences does not divide among 3 data ranks"),
        (["4b", "--train", "--gpus", "2"], "there is no model at 4b; give a directory, or one of the recipes toy"),
        (["3b-extend", "--train", "--gpus", "8", "--gpu", "h100"], "--context-length 32768 (65.4 GiB) would fit"),
        (
            ["3b", "--train", "--gpus", "8", "--update", "fully-sharded", "--state-parallel", "2"],
            "parallelism.state above 1 does not go with update fully-sharded",
        ),
    ],
)
def test_wrong_plans_are_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("longread: error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_refused_context_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """What the refusal proposes for a recipe of pre-training, at as many tokens a step."""
    found = figures(capsys, "3b", "--train", "--gpus", "8", "--context-length", "4096")
    assert next(iter(found)).startswith("3b-e2e on 8 × h200, update shared: 256 × 4,096 tokens a")


# The page.


def test_the_page_shows_what_the_command_and_the_script_print(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.scaling_prediction import tables

    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    (command,) = re.findall(r"^longread (estimate .*)$", page, re.MULTILINE)
    assert command in str(estimate.__doc__)
    assert main(command.split()) == 0
    for line in capsys.readouterr().out.splitlines():
        assert f"\n    {line}\n" in page
    for table in tables(H200):
        assert f"\n\n{table}\n\n" in page


def test_predictions_take_as_little_state_parallelism_as_they_can() -> None:
    from benchmarks.scaling_prediction import of_whole_batch, run_of

    found = {count: of_whole_batch(run_of("3b", 131_072), count, H200) for count in (8, 64, 128, 256)}
    assert [plan and plan.layout.parallelism.state for plan in found.values()] == [1, 4, 8, None]
    assert [plan and plan.layout.all_gpus for plan in found.values()] == [8, 64, 128, None]
