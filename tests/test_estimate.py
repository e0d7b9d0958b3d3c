"""The arithmetic of memory, beside real sessions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from longread.checkpoint import save_model
from longread.cli import estimate, main
from longread.engine import largest_session
from longread.model import Transformer
from longread.outer_loop import UPDATE_BYTES, graph_bytes, num_trained
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from tests.server import INNER, M, make_model


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert main(["estimate", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:60].strip(): line[60:].strip() for line in lines}


def test_no_session_is_larger_and_some_are_as_large() -> None:
    session, sizes = Session(make_model(), INNER), []
    for _ in range(5 * M):
        session.read([1])
        sizes.append(session.nbytes)
    assert max(sizes) == largest_session(session.model)


def test_of_3b_as_many_write_as_the_benchmark_found(capsys: pytest.CaptureFixture[str]) -> None:
    """On an H200 20 took the whole budget, and of full attention one wrote, two did not (benchmarks/results)."""
    found = figures(capsys, "3b", "--precision", "bfloat16", "--memory", "139")
    assert found["one session, at any length"] == "3.86 GiB"
    assert found["keys and values of full attention at 131,072 tokens"] == "40.00 GiB"
    assert found["sessions that write at once"] == "20"
    assert found["texts of full attention that write at once"] == "1"


def test_a_small_model_is_held_back_by_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "small", "--precision", "float32", "--memory", "139")
    assert found["sessions that write at once, the most that may (--max-batch)"] == "32"
    assert int(found["sessions that lie there, none of which writes"].replace(",", "")) > 1000


def test_the_documentation_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    text += (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    commands = re.findall(r"^longread (estimate .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(command.split()) == 0
        for line in capsys.readouterr().out.splitlines():
            assert f"\n    {line}\n" in text
        assert command in str(estimate.__doc__)


def test_of_training_too(capsys: pytest.CaptureFixture[str]) -> None:
    """GiB; measured on an H200 with sqrt: 56.4 (benchmarks/results)."""
    options = "--train", "1", "--precision", "bfloat16", "--context-length", "131072"
    found = figures(capsys, "760m", *options, "--memory", "139")
    step = "a step of 1 × 131,072 tokens in bfloat16, recompute"
    assert float(found[f"{step} sqrt"].removesuffix(" GiB")) == pytest.approx(56.4, rel=0.1)
    assert found["the first that fits into 139 GiB, a fifth left free"] == "76-steps"
    assert float(found[f"{step} 76-steps"].removesuffix(" GiB")) == pytest.approx(110.7, abs=0.1)
    less = figures(capsys, "760m", *options, "--memory", "40")
    assert less["the first that fits into 40 GiB, a fifth left free"] == "none of them"
    assert main(["estimate", "toy", "--train", "1", "--context-length", "1000"]) == 2
    assert "--context-length is 1000; give a multiple of the mini-batch, 32" in capsys.readouterr().err


def test_a_context_length_given_as_a_number_of_sequences_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "125m", "--train", "32768"]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error == (
        "longread: error: --train 32768 is 32,768 sequences of 131,072 tokens at a time, more than 16,777,216 tokens; "
        "give fewer or shorter ones, or --train 1 --context-length 32768 if that is how long one is to be\n"
    )
    assert main(["estimate", "toy", "--train", "129"]) == 2
    assert "--train 129 is 129 sequences of 131,072 tokens" in capsys.readouterr().err
    assert figures(capsys, "toy", "--train", "128")
    assert figures(capsys, "toy", "--train", "2048", "--context-length", "1024")
    assert figures(capsys, "toy", "--train", "1", "--context-length", str(2**25))


def test_of_training_the_suffix_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moments and gradients of it only; that weights are not read shows where there are none."""
    save_model(tmp_path, model := make_model(), INNER, ByteTokenizer.fingerprint)
    (tmp_path / "model.safetensors").unlink()
    S = model.config.num_suffix_blocks
    options = str(tmp_path), "--train", "1", "--precision", "float32", "--context-length", str(4 * M)
    trained = num_trained(model.config, S)
    found = figures(capsys, *options, "--only", "suffix")
    size = 4 * model.config.num_parameters + UPDATE_BYTES * trained
    assert found[f"parameters, and gradients and AdamW of {S} blocks, in float32"] == f"{size / 2**20:,.2f} MiB"
    step = f"a step of 1 × {4 * M} tokens in float32, recompute none"
    need = graph_bytes(
        *(model.config, "end-to-end"),
        batch_size=1,
        context_length=4 * M,
        itemsize=4,
        kernels=False,
        trained_blocks=S,
    )
    assert found[step] == f"{(size + need['none']) / 2**20:,.2f} MiB"
    assert main(["estimate", "toy", "--only", "suffix"]) == 2
    assert "--only is about training; give --train too" in capsys.readouterr().err


def test_a_model_on_disk_can_be_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path, make_model(), INNER, ByteTokenizer.fingerprint)
    found = figures(capsys, str(tmp_path), "--precision", "float32")
    assert found["one session, at any length"] == f"{largest_session(make_model()) / 2**20:.2f} MiB"


def test_figures_are_of_this_machine_unless_asked_otherwise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for found, precision in (("cpu", "float32"), ("cuda", "bfloat16")):
        monkeypatch.setattr("longread.model.find_device", lambda name, found=found: torch.device(found))
        asked = figures(capsys, "small", "--precision", precision)
        assert figures(capsys, "small") == asked
        assert precision in next(iter(asked))


def test_too_little_memory_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    for memory, words in (
        ("1", "The parameters alone take 5.40 GiB; give more --memory."),
        ("9", "The parameters leave 3.60 GiB, sessions may take 2.52 GiB of that, and one that enters the place "),
    ):
        assert main(["estimate", "3b", "--precision", "bfloat16", "--memory", memory]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-3].split()[-1] == "0"
        assert lines[-1].startswith(words)
        assert lines[-1].endswith("; give more --memory.")


def test_rows_that_say_nothing_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(make_model().config, num_suffix_blocks=0, attention="full")
    save_model(tmp_path, Transformer(config), INNER, ByteTokenizer.fingerprint)
    found = figures(capsys, str(tmp_path), "--memory", "1")
    assert [words.split(",")[0] for words in found] == [
        "parameters",
        "one session at 131",
        "for sessions",
        "sessions that lie there",
        "sessions that write at once",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["3B"], "there is no model at 3B; give a directory, or one of the recipes toy, small, "),
        (["3b", "--memory", "-1"], "--memory is -1; give GiB, above 0 and below 1073741824"),
        (["3b", "--memory", "inf"], "--memory is inf; give GiB, above 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == 2
    assert words in capsys.readouterr().err
