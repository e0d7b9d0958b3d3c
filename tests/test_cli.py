"""The command line as a user meets it: from texts to a trained model, a kept session, figures; and wrong input."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longread.checkpoint import load_model, save_model
from longread.cli import build_parser, main
from longread.cli.arguments import changed
from longread.config import UserError
from longread.model import Transformer
from longread.recipes import toy
from longread.session import Session
from longread.tokenizer import ByteTokenizer

MICROSCOPIC = [
    *("--set", "model.width=16", "--set", "model.num_blocks=2", "--set", "model.num_heads=2"),
    *("--set", "model.mlp_hidden=16", "--set", "model.window_size=16", "--set", "model.mini_batch_size=8"),
    *("--set", "steps=3", "--set", "optimizer.warmup_steps=1", "--set", "optimizer.decay_steps=3"),
    *("--set", "batch_size=2", "--context-length", "64", "--device", "cpu"),
]
SENTENCES = "".join(f"Sentence {i} of the text says {i * i % 101}, and not {i % 7}. " for i in range(400))
LONG = SENTENCES[:2000]

# Commands and options, frozen: whoever changes these changes what users have in their scripts.
COMMAND_LINE = {
    "prepare": "SOURCE --out --tokenizer --train-tokenizer --documents --validation-fraction --field --exclude "
    "--vocab-size --bos-id --array-tokens --stretch --encoding --errors --keep-line-ends --overwrite --json --quiet "
    "--force",
    "train": "RECIPE --data --out --method --context-length --steps --tokens --lr --batch-size --window --mini-batch "
    "--only --validation --init --resume --seed --set --update --state-parallel --deadline --profile-steps --tracker "
    "--device --json --quiet --force",
    "read": "FILE --model --device --encoding --errors --keep-line-ends --markup --session --save --resume "
    "--save-every --control --learn --kept-tokens --json --quiet --force --report",
    "generate": "--model --device --session --prompt --prompt-file --interactive --max-tokens --temperature --top-p "
    "--top-k --repetition-penalty --seed --stop --frozen --learn --kept-tokens --save --draft "
    "--draft-session --draft-tokens --json --quiet --force",
    "evaluate": "MODEL --data --encoding --errors --keep-line-ends --markup "
    "--documents --max-tokens --min-tokens --lengths --indices --window --full --mini-batch "
    "--batch-size --no-control --health --learn --kept-tokens --json --quiet --force --plots --report --device",
    "needle": "MODEL --variants --contexts --depths --probe --samples --seed --haystack --encoding --errors "
    "--keep-line-ends --markup --repeat-haystack --max-tokens "
    "--batch-size --no-control --learn --kept-tokens --json --quiet --force --plots --report --device",
    "questions": "MODEL --data --encoding --errors --keep-line-ends --markup --contexts --documents --questions "
    "--choices --seed --batch-size --no-control --learn --kept-tokens --json --quiet --force --plots --report --device",
    "judge": "MODEL --judge --data --encoding --errors --keep-line-ends --markup "
    "--context --written --documents --temperature --top-p --repetition-penalty --seed --bins "
    "--batch-size --no-control --learn --kept-tokens --json --quiet --force --plots --report --device",
    "demo": "FILE --model --device --tokens",
    "convert": "SOURCE DIR --to --drop-fast --window --mini-batch --suffix --fast-hidden --scheme --dtype --tokenizer "
    "--size",
    "bench": "WORK --sizes --methods --contexts --sequences --gpus --update --state-parallel --repeats --profile "
    "--from --json --report --plots --force --device",
    "serve": "--model --device --learn --kept-tokens --directory --name --host --port --keys --metrics-keys "
    "--device-memory --host-memory --disk --max-sessions --max-batch --max-waiting --batch-invariant --keep-line-ends "
    "--reuse --limit",
    "think": "ACTION",
    "estimate": "MODEL --context-length --train --only --precision --memory --kept-tokens --gpus --nodes --gpu "
    "--batch-size --update --state-parallel --recompute --price --json --quiet --force",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, a data set with a held-out part, and a microscopic trained run."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    for i in range(8):
        (home / "texts" / f"{i}.txt").write_text(SENTENCES[i * 500 : i * 500 + 3000])
    arguments = ["prepare", home / "texts", "--out", home / "data", "--validation-fraction", "0.3"]
    assert main([str(a) for a in arguments]) == 0
    arguments = ["train", "toy", "--data", home / "data", "--out", home / "run", *MICROSCOPIC]
    assert main([str(a) for a in arguments]) == 0
    (home / "long.txt").write_text(LONG)
    return home


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 2) -> str:
    """The one sentence on stderr with which a command ends."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longread: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_command_line_is_frozen() -> None:
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    found = {
        name: " ".join(a.option_strings[0] if a.option_strings else str(a.metavar) for a in parser._actions[1:])
        for name, parser in commands.items()
    }
    assert found == COMMAND_LINE


@pytest.mark.parametrize("command", COMMAND_LINE)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"longread {command} " in capsys.readouterr().out.split("Example:")[1]


def test_help_needs_no_torch() -> None:
    code = "import sys, longread.cli as c; c.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_preparing_says_what_it_made(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text(SENTENCES)
    (tmp_path / "mixed" / "b.bin").write_bytes(b"\0\1\2")
    assert main(["prepare", str(tmp_path / "mixed"), "--out", str(tmp_path / "d"), "--train-tokenizer", "300"]) == 0
    out, err = capsys.readouterr()
    assert "1 documents" in out
    assert "skipped: 1 binary" in err
    assert json.loads((tmp_path / "d" / "index.json").read_text())["vocab_size"] <= 300


def test_reading_reports_learning_beside_frozen_and_keeps_the_session(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("session", "figures.json", "page.html")}
    arguments = ["read", home / "long.txt", "--model", home / "run", "--save", files["session"]]
    arguments += ["--json", files["figures.json"], "--report", files["page.html"]]
    assert main([str(a) for a in arguments]) == 0
    out = capsys.readouterr().out
    assert "learning" in out
    assert "frozen" in out
    assert f"{len(LONG) + 1:,} tokens read" in out
    figures = json.loads(files["figures.json"].read_text())
    learning, frozen = figures["results"]
    assert (learning["reading"], frozen["reading"]) == ("learning", "frozen")
    assert learning["tokens"] == len(LONG) + 1
    gain = frozen["loss"]["nats_per_token"]["mean"] - learning["loss"]["nats_per_token"]["mean"]
    assert learning["gain_over_frozen"]["mean"] == pytest.approx(gain)
    assert learning["health"]["steps"] == len(LONG) // 8
    bits = learning["loss"]["bits_per_byte"]["mean"]
    assert bits == pytest.approx(learning["loss"]["nats_per_token"]["mean"] / 0.693147, rel=1e-5)
    page = files["page.html"].read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert f"{learning['loss']['nats_per_token']['mean']:.3f}" in page

    arguments = ["generate", "--model", home / "run", "--session", files["session"]]
    texts = []
    for more in (["--prompt", "Once"], ["--prompt", "Once"], ["--prompt", "Once", "--seed", "2"]):
        assert main([str(a) for a in [*arguments, "--max-tokens", 30, "--seed", 1, *more]]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_reading_in_two_commands_is_reading_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = SENTENCES[:403], SENTENCES[403:800]
    (tmp_path / "first").write_text(first)
    (tmp_path / "whole").write_text(first + second)
    run = ["--model", str(home / "run"), "--device", "cpu"]
    assert main(["read", str(tmp_path / "first"), *run, "--save", str(tmp_path / "s")]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(second.encode())))
    assert main(["read", "-", *run, "--session", str(tmp_path / "s"), "--save", str(tmp_path / "s")]) == 0
    assert main(["read", str(tmp_path / "whole"), *run, "--save", str(tmp_path / "w"), "--no-control"]) == 0
    capsys.readouterr()
    texts = []
    for session in ("s", "w"):
        assert main(["generate", *run, "--session", str(tmp_path / session), "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_short_text_is_read_and_said_to_teach_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short").write_text("short")
    assert main(["read", str(tmp_path / "short"), "--model", str(home / "run")]) == 0
    assert "6 tokens complete no mini-batch of 8: nothing could be learned" in capsys.readouterr().out


def test_evaluating_compares_models(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swa = ["train", "toy", "--method", "swa", "--data", home / "data", "--out", tmp_path / "swa", *MICROSCOPIC]
    assert main([str(a) for a in swa]) == 0
    arguments = ["evaluate", home / "run", tmp_path / "swa", "--data", home / "data", "--max-tokens", 600]
    arguments += ["--lengths", 64, 256]
    arguments += ["--json", tmp_path / "e.json", "--plots", tmp_path / "plots", "--report", tmp_path / "e.html"]
    capsys.readouterr()
    assert main([str(a) for a in [*arguments, "--indices", 7]]) == 0
    assert "swa" in capsys.readouterr().out
    figures = json.loads((tmp_path / "e.json").read_text())
    assert [r["reading"] for r in figures["results"]] == ["learning", "frozen", "static"]
    assert [row["context_length"] for row in figures["results"][2]["by_context_length"]] == [64, 256]
    assert figures["results"][0]["at_index"][0]["start"] == 7
    assert figures["results"][0]["loss"]["bits_per_byte"]["n"] == figures["documents"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "loss_by_position.png",
        "loss_by_context_length.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    assert "<svg" in (tmp_path / "e.html").read_text()
    texts = ["evaluate", home / "run", "--data", home / "texts", "--documents", 2, "--max-tokens", 100, "--no-control"]
    assert main([str(a) for a in texts]) == 0


def test_a_model_is_read_as_it_was_before_its_windows(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside its learning self: frozen, and as the network with full attention that has its weights."""
    arguments = [
        "evaluate",
        home / "run",
        "--full",
        home / "run",
        home / "run",
        "--data",
        home / "data",
        "--no-control",
    ]
    assert main([str(a) for a in [*arguments, "--json", tmp_path / "e.json", "--max-tokens", 300]]) == 0
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    names = ["run", "run 1, full attention", "run 2, full attention"]
    assert [(r["model"], r["reading"]) for r in results] == list(
        zip(names, ["learning", "frozen", "frozen"], strict=True)
    )
    loaded = load_model(home / "run")
    whole = Transformer(dataclasses.replace(loaded.model.config, attention="full", num_suffix_blocks=1))
    whole.load_state_dict(loaded.model.state_dict())
    save_model(tmp_path / "whole", whole, loaded.inner, ByteTokenizer.fingerprint)
    ByteTokenizer().save(tmp_path / "whole")
    arguments = ["evaluate", tmp_path / "whole", "--data", home / "data", "--json", tmp_path / "w.json"]
    assert main([str(a) for a in [*arguments, "--max-tokens", 300]]) == 0
    frozen = json.loads((tmp_path / "w.json").read_text())["results"][1]
    assert frozen["loss"] == results[1]["loss"]
    assert frozen["loss"] != results[0]["loss"]


def test_models_go_to_the_official_layout_and_back(home: Path, tmp_path: Path) -> None:
    assert main(["convert", str(home / "run"), str(tmp_path / "official")]) == 0
    assert main(["convert", str(tmp_path / "official"), str(tmp_path / "back")]) == 0
    from longread.checkpoint import load_model

    assert load_model(tmp_path / "back").fingerprint == load_model(home / "run").fingerprint


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty; give a text"),
        (b"\xef\xbb\xbf", "is empty; give a text"),
        (b"\xef\xbb", "is not valid UTF-8 from byte 0 on"),
        (b"text\0text", "is no text: its byte 4 is zero"),
        (b"caf\xe9 au lait", "is not valid UTF-8 from byte 3 on"),
        (None, "does not exist or cannot be reached; check the path"),
    ],
)
def test_a_text_that_cannot_be_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    sentence = fails(capsys, "read", tmp_path / "text", "--model", home / "run", "--save", tmp_path / "session")
    assert re.search(reason, sentence), sentence
    assert not (tmp_path / "session").exists()


def test_plots_that_cannot_be_drawn_are_refused_before_the_reading(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    outputs = "--json", tmp_path / "j.json", "--plots", tmp_path / "plots"
    error = fails(capsys, "evaluate", home / "run", "--data", home / "data", *outputs)
    assert "plots need matplotlib; run pip install matplotlib" in error
    assert not (tmp_path / "j.json").exists()


@pytest.mark.parametrize("option", ["--lengths", "--indices"])
def test_what_no_document_reaches_is_not_left_out_in_silence(
    home: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    command = "evaluate", home / "run", "--data", home / "data", "--max-tokens", 100
    assert f"{option} 100 is more than 99 tokens, and no document has more than 100; lower it" in fails(
        capsys, *command, option, 100
    )
    assert main([str(argument) for argument in (*command, option, 99)]) == 0


def test_extras_are_installed_from_the_folder() -> None:
    """There is no package of this name in an index, and who registered one would get these installs."""
    root = Path(__file__).parent.parent
    for path in (root / "README.md", *(root / "docs").glob("*.md"), *(root / "src").rglob("*.py")):
        assert "longread[" not in path.read_text(), path


def test_data_that_are_not_there(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "data" in fails(capsys, "train", "toy", "--data", tmp_path, "--out", tmp_path / "run")
    assert "missing" in fails(capsys, "prepare", tmp_path / "missing", "--out", tmp_path / "out")
    assert "no document has 99999 tokens" in fails(
        capsys, "evaluate", home / "run", "--data", home / "data", "--min-tokens", 99999
    )


def test_models_that_cannot_be_opened(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = home / "long.txt"
    assert "there is no model at" in fails(capsys, "read", text, "--model", tmp_path / "none")
    model = tmp_path / "model"
    shutil.copytree(home / "run" / "model", model)
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer.json beside it" in fails(capsys, "read", text, "--model", model)
    assert main(["prepare", str(text), "--out", str(tmp_path / "bpe"), "--train-tokenizer", "260"]) == 0
    shutil.copy(tmp_path / "bpe" / "tokenizer.json", model / "tokenizer.json")
    assert "is not the tokenizer of" in fails(capsys, "read", text, "--model", model)
    assert "another tokenizer" in fails(capsys, "evaluate", home / "run", "--data", tmp_path / "bpe")
    (model / "model.safetensors").write_bytes(b"this is no safetensors file, only text")
    assert "safetensors" in fails(capsys, "read", text, "--model", model)


def test_output_that_cannot_be_written_is_said_before_the_work(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ["read", home / "long.txt", "--model", home / "run"]
    assert "it is a directory" in fails(capsys, *read, "--save", tmp_path)
    assert "no ordinary file" in fails(capsys, *read, "--json", os.devnull)
    assert "File name too long" in fails(capsys, *read, "--report", "x" * 300)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    assert "not a directory that may be written to" in fails(capsys, *read, "--json", tmp_path / "x.json")


def test_data_whose_replacement_was_killed_are_evaluated(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / ".data.0123abcd.new")
    shutil.copytree(home / "data", tmp_path / ".data.0123abcd.old")
    assert main(["evaluate", str(home / "run"), "--data", str(tmp_path / "data"), "--documents", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_frozen_is_about_one_command(home: Path, tmp_path: Path) -> None:
    saved = str(tmp_path / "s.session")
    model = str(home / "run")
    assert main(["generate", "--model", model, "--prompt", "x", "--max-tokens", "2", "--frozen", "--save", saved]) == 0
    assert Session.restore(saved, load_model(model).model).learn


@pytest.mark.parametrize("device", ["meta", "banana", "cuda:99"])
def test_devices_that_cannot_be_used(home: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert f"device {device} cannot be used" in fails(
        capsys, "generate", "--model", home / "run", "--prompt", "x", "--device", device
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "nan"], "top_p is nan"),
        (["--top-k", "0"], "top_k is 0"),
        (["--max-tokens", "-5"], "max_tokens is -5"),
        (["--stop", ""], "--stop is empty"),
    ],
)
def test_sampling_out_of_range(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert reason in fails(capsys, "generate", "--model", home / "run", "--prompt", "x", *arguments)


def test_another_model_guesses_what_is_written(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedily the text is that of the model alone; what is kept is a session that goes on as any other."""
    run = ["generate", "--model", str(home / "run"), "--prompt", "Sentence 3", "--frozen", "--max-tokens", "12"]
    assert main([*run, "--temperature", "0"]) == 0
    alone = capsys.readouterr().out
    session = str(tmp_path / "s")
    assert main([*run, "--temperature", "0", "--draft", str(home / "run"), "--save", session]) == 0
    out, err = capsys.readouterr()
    assert out == alone
    assert re.fullmatch(r"9 of 9 guesses were right, 3\.00 in each round\n", err)
    assert Session.restore(session, load_model(home / "run").model).position == 1 + len("Sentence 3") + 12
    drafted = [*run, "--draft", str(home / "run"), "--draft-session", session, "--draft-tokens", "2", "--seed", "1"]
    assert main(drafted) == 0
    once = capsys.readouterr().out
    assert main(drafted) == 0
    assert capsys.readouterr().out == once


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--draft-session", "s"], "--draft-session belongs to --draft"),
        (["--draft", "HOME"], "learns while it writes, so nobody can look ahead for it; add --frozen"),
        (["--draft", "HOME", "--frozen", "--draft-tokens", "0"], "draft_tokens is 0; it must be at least 1"),
    ],
)
def test_a_draft_that_cannot_be(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    arguments = [str(home / "run") if argument == "HOME" else argument for argument in arguments]
    assert reason in fails(capsys, "generate", "--model", home / "run", "--prompt", "x", *arguments)


def test_an_interrupted_continuation_is_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write(text: str) -> int:
        written.append(text)
        if len(written) == 5:
            raise KeyboardInterrupt
        return len(text)

    arguments = [
        "generate",
        "--model",
        str(home / "run"),
        "--prompt",
        "ab",
        "--save",
        str(tmp_path / "s"),
        "--seed",
        "1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", write)
        assert main(arguments) == 130
    session = Session.restore(tmp_path / "s", load_model(home / "run").model)
    assert 3 + 4 <= session.position <= len(session.recent)
    assert ByteTokenizer().decode(session.recent) == "ab" + "".join(written[:4])  # the fifth piece was not shown


def test_settings_are_typed() -> None:
    config = changed(toy(), ["steps=7", "inner.clip=none", "optimizer.lr=1e-2", "model.qk_norm=false", "loss=static"])
    assert (config.steps, config.inner.clip, config.optimizer.lr) == (7, None, 0.01)
    assert (config.model.qk_norm, config.loss) == (False, "static")
    with pytest.raises(UserError, match="loss is 'both'; it must be one of end-to-end, static"):
        changed(toy(), ["loss=both"])
