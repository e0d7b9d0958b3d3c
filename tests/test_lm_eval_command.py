"""lm-evaluation-harness itself: it finds Longread, hands it arguments and reports what direct scoring gives."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from longread.config import UserError
from longread.loading import OpenModel, open_model
from longread.tokenizer import ByteTokenizer
from tests.lm_eval_readers import DOCUMENTS, directly, harness_model, save, write_task


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), ByteTokenizer())


@pytest.fixture(scope="module")
def opened(directory: Path) -> OpenModel:
    return open_model(directory, "cpu")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"pretrained": "nowhere"}, "there is no model at nowhere"),
        ({"max_length": 2048}, "has no argument 'max_length'"),
        ({"learn": "maybe"}, "learn is 'maybe'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"prefix_token_id": 257}, "prefix_token_id is 257; the model knows ids 0 to 256"),
    ],
)
def test_wrong_arguments_are_refused(directory: Path, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        harness_model(directory, **arguments)


def test_arguments_of_the_command_line(directory: Path) -> None:
    from longread.lm_eval import LongreadLM

    made = LongreadLM.create_from_arg_string(
        f"pretrained={directory},learn=false,dtype=float32", {"batch_size": "auto:4", "device": "cuda:0"}
    )
    assert not made.learn
    assert made.batch_size == 8
    assert made.get_model_info()["model_dtype"] == "torch.float32"
    assert harness_model(directory).learn
    assert made.tok_encode("a") == [256, 97]
    assert made.tok_encode("a", add_special_tokens=False) == [97]
    assert made.eot_token_id == made.prefix_token_id == 256


def test_the_harness_finds_it() -> None:
    from lm_eval.api.registry import get_model, model_registry

    from longread.lm_eval import LongreadLM

    assert get_model("longread") is LongreadLM
    assert "hf" in model_registry  # the harness's own are still there
    groups = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups == {"lm_eval.models": {"longread": f"{LongreadLM.__module__}:{LongreadLM.__name__}"}}


def test_without_the_harness_it_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from longread.lm_eval.adapter import harness_class

    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(UserError, match="run pip install lm_eval"):
        harness_class.__wrapped__()


def bits_per_byte(opened: OpenModel, learn: bool) -> float:
    sums = [-opened.session(learn=learn).read(text).double().sum().item() for text in DOCUMENTS]
    return -(sum(sums) / sum(len(text.encode()) for text in DOCUMENTS)) / math.log(2)


def reported(table: str) -> float:
    """What the harness prints, with four places."""
    (row,) = [line for line in table.splitlines() if "|bits_per_byte|" in line]
    return float(row.split("|")[7])


@pytest.mark.parametrize("learn", [True, False])
def test_the_harness_reports_what_direct_scoring_gives(
    directory: Path, opened: OpenModel, tmp_path: Path, learn: bool
) -> None:
    import lm_eval
    import lm_eval.tasks

    import longread.lm_eval

    assert longread.lm_eval
    reading = write_task(tmp_path)
    choosing = reading | {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(
        model="longread",
        model_args={"pretrained": str(directory), "learn": learn},
        tasks=[reading, choosing],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        bootstrap_iters=0,
        device="cpu",
    )
    assert found["results"]["reading"]["bits_per_byte,none"] == bits_per_byte(opened, learn)
    assert found["config"]["learn"] is learn
    right = 0
    for text in DOCUMENTS:
        scores = [
            directly(
                opened, [256, *text.rstrip().encode()], [*text[len(text.rstrip()) :].encode(), *f" {x}".encode()], learn
            )
            for x in "ABC"
        ]
        right += scores.index(max(scores)) == 1
    assert found["results"]["choosing"]["acc,none"] == right / len(DOCUMENTS)


def test_the_command_line(
    directory: Path,
    opened: OpenModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import functools

    import lm_eval.tasks

    from longread.lm_eval import main

    # the harness's own list of ten thousand tasks takes 13 s to read
    quick = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    (tmp_path / "reading.yaml").write_text(json.dumps(write_task(tmp_path)))
    options = ["--tasks", str(tmp_path / "reading.yaml"), "--model", "longread", "--model_args"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options, f"pretrained={directory},learn=true"])
    assert main() == 0
    assert reported(capsys.readouterr().out) == pytest.approx(bits_per_byte(opened, learn=True), abs=1e-3)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options, "pretrained=nowhere"])
    assert main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longread.lm_eval: error: ")]
    assert "there is no model at nowhere" in line


@pytest.mark.slow
def test_the_command_line_as_a_process(directory: Path, opened: OpenModel, tmp_path: Path) -> None:
    (tmp_path / "reading.yaml").write_text(json.dumps(write_task(tmp_path)))
    command = [sys.executable, "-m", "longread.lm_eval", "--model", "longread"]
    command += ["--model_args", f"pretrained={directory},learn=true", "--tasks", str(tmp_path / "reading.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert reported(done.stdout) == pytest.approx(bits_per_byte(opened, learn=True), abs=1e-3)
