"""What commands write and what they refuse before they work: no file is replaced unasked, no number is a slip."""

from __future__ import annotations

import io
import json
import os
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.status import Status

from longread.bench import Machine
from longread.cli import main
from longread.cli.models import table_names
from longread.cli.outputs import counted
from longread.recipes import RECIPES, Method
from longread.speculative.speculation import DRAFT_TOKENS
from tests.small_model import TEXT, save_small_model

NEEDLE = ["needle", "model", "--contexts", "400", "--depths", "0", "--samples", "1", "--max-tokens", "1"]
NEEDLE += ["--no-control"]
EVALUATE = ["evaluate", "model", "--data", "texts", "--no-control"]
JUDGE = ["judge", "model", "--judge", "other", "--data", "texts", "--context", "64", "--documents", "1", "--no-control"]
READ = ["read", "text.txt", "--model", "model", "--no-control"]
GENERATE = ["generate", "--model", "model", "--prompt", "x", "--max-tokens", "2"]
BENCH = ["bench", "prefill", "--sizes", "toy", "--methods", "swa", "--contexts", "32", "--repeats", "1"]


@pytest.fixture(scope="module", autouse=True)
def _quick_bench() -> Iterator[None]:
    """What surrounds `longread bench`: short texts for its gates, and a machine that is known."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_VOCABULARY": 100, "_WIDTH": 64, "_MINI_BATCH": 32, "_TOKENS": 96}.items():
            patch.setattr(f"longread.bench.gate.{name}", value)
        patch.setattr("longread.bench.run.measure_machine", lambda device: Machine("one", "product", 1e11, 1e10))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and texts; a session, and one of each output of each command in `old`."""
    home = tmp_path_factory.mktemp("home")
    for i, name in enumerate(("model", "other")):
        save_small_model(home / name, seed=i)
    (home / "texts").mkdir()
    (home / "text.txt").write_text(TEXT)
    (home / "texts" / "t0.txt").write_text(TEXT)
    before = Path.cwd()
    os.chdir(home)
    try:
        outputs = ["--json", "old/{}.json", "--report", "old/{}.page", "--plots", "old/plots"]
        for command in (NEEDLE, EVALUATE, JUDGE, BENCH):
            assert main([*command, "--device", "cpu", *(a.format(command[0]) for a in outputs)]) == 0
        assert main([*EVALUATE, "--device", "cpu", "--health", "--plots", "old/plots", "--force"]) == 0
        assert main([*READ, "--device", "cpu", "--save", "old/session"]) == 0
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it all as working directory."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def contents(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], home: Path, *arguments: str) -> str:
    """The one sentence of a command that ends with status 2 and leaves every file as it was."""
    before = contents(home)
    capsys.readouterr()
    device = [] if arguments[0] in ("prepare", "estimate") else ["--device", "cpu"]
    assert main([*arguments, *device]) == 2
    assert contents(home) == before
    error = capsys.readouterr().err
    assert error.startswith("longread: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("longread: error: ").rstrip()


# What is read is never replaced.


@pytest.mark.parametrize(
    ("arguments", "option", "path"),
    [
        ([*READ, "--save", "text.txt"], "--save", "text.txt"),
        ([*READ, "--json", "./texts/../text.txt"], "--json", "./texts/../text.txt"),
        ([*READ, "--report", "link"], "--report", "link"),
        (["read", "old/evaluate.page", *READ[2:], "--report", "old/evaluate.page"], "--report", "old/evaluate.page"),
        ([*EVALUATE[:3], "texts/t0.txt", "--json", "texts/t0.txt"], "--json", "texts/t0.txt"),
        ([*EVALUATE[:3], "old/*.json", "--json", "old/evaluate.json"], "--json", "old/evaluate.json"),
        ([*NEEDLE, "--haystack", "old/needle.page", "--report", "old/needle.page"], "--report", "old/needle.page"),
        ([*JUDGE, "--data", "old/judge.json", "--json", "old/judge.json"], "--json", "old/judge.json"),
        (["bench", "--from", "old/bench.json", "--report", "old/bench.json"], "--report", "old/bench.json"),
        ([*GENERATE, "--draft", "other", "--draft-session", "old/session", "--save", "old/session"], "--save", ""),
        ([*GENERATE, "--session", "old/session", "--json", "old/session"], "--json", ""),
        ([*EVALUATE, "--json", "texts/t0.txt"], "--json", "texts/t0.txt"),
    ],
)
def test_an_input_is_not_replaced(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], option: str, path: str
) -> None:
    (home / "link").symlink_to(home / "text.txt")
    path = path or "old/session"
    expected = f"{option} would replace {path}, which is read; give another name"
    for force in ([], ["--force"]):
        assert refused(capsys, home, *arguments, *force) == expected


def test_a_data_set_is_replaced_but_no_file_of_the_user_beside_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "texts" / "t1.txt").write_text("Another. " + TEXT)
    prepare = ["prepare", "texts", "--out", "data", "--validation-fraction", "0.5"]
    assert main(prepare) == 0
    for name in ("more.txt", "validation/more.txt"):
        (home / "data" / name).write_text(TEXT)
        for source in ("texts", f"data/{name}"):
            sentence = refused(capsys, home, "prepare", source, "--out", "data", "--overwrite")
            assert sentence == f"--overwrite would replace data/{name}, which is no part of the data set; move it"
        (home / "data" / name).unlink()
    assert main([*prepare, "--overwrite"]) == 0


# Two outputs are two files.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*READ, "--json", "new", "--report", "new"], "--json and --report are both new"),
        ([*READ, "--save", "new", "--json", "texts/../new"], "--save and --json are both texts/../new"),
        (
            [*NEEDLE, "--report", "p/s_niah_1.png", "--plots", "p"],
            "--report and --plots are both p/s_niah_1.png",
        ),
        ([*BENCH, "--json", "new", "--report", "new"], "--json and --report are both new"),
    ],
)
def test_two_outputs_are_two_files(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert refused(capsys, home, *arguments) == f"{sentence}; give each a file of its own"


# What exists is replaced with --force alone.


@pytest.mark.parametrize(
    "arguments",
    [
        [*READ, "--save", "FILE"],
        [*GENERATE, "--save", "FILE"],
        [*READ, "--json", "FILE"],
        [*READ, "--report", "FILE"],
        [*EVALUATE, "--json", "FILE"],
        [*NEEDLE, "--report", "FILE"],
        [*JUDGE, "--json", "FILE"],
        [*BENCH, "--report", "FILE"],
        ["estimate", "toy", "--json", "FILE"],
        ["prepare", "texts", "--out", "data", "--json", "FILE"],
        ["think", "watch", "--report", "FILE"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-2]}",
)
@pytest.mark.parametrize("there", ["user.html", "old/evaluate.json", "old/session"])
def test_what_exists_is_not_replaced(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], there: str
) -> None:
    """A valid output of the same command as little as anything else."""
    (home / "user.html").write_text("<!doctype html>")
    arguments = [there if argument == "FILE" else argument for argument in arguments]
    resumes = "--resume goes on with it, " if arguments[0] == "read" and arguments[-2] == "--save" else ""
    expected = f"{arguments[-2]} would replace {there}; {resumes}--force replaces it, another name leaves it be"
    assert refused(capsys, home, *arguments) == expected


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    "arguments", [[*GENERATE, "--save"], [*EVALUATE, "--json"], [*BENCH, "--report"]], ids=lambda a: a[0]
)
def test_a_file_of_a_model_is_not_replaced_by_force(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], name: str
) -> None:
    (home / "other" / "tokenizer.json").touch()
    sentence = refused(capsys, home, *arguments, f"other/{name}", "--force")
    expected = f"{arguments[-1]} would replace other/{name}, a file of a model, run or data set; give another name"
    assert sentence == expected


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (NEEDLE, ["s_niah_1.png"]),
        (EVALUATE, ["loss_by_position.png", "loss_by_context_length.png"]),
        ([*EVALUATE, "--health"], ["inner_gradient_norm.png", "drift.png"]),
        (JUDGE, ["judged_loss_by_position.png"]),
        (BENCH, ["prefill.svg", "training.svg", "decoding.svg"]),
    ],
)
def test_a_plot_that_exists_is_not_replaced(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], names: list[str]
) -> None:
    (home / "pictures").mkdir()
    for name in names:
        path = home / "pictures" / name
        path.write_bytes(b"a picture")
        sentence = refused(capsys, home, *arguments, "--plots", "pictures")
        assert sentence.startswith(f"--plots would replace pictures/{name}; --force replaces it")
        path.unlink()
    assert "text.txt is not a directory" in refused(capsys, home, *arguments, "--plots", "text.txt")


@pytest.mark.parametrize("command", [NEEDLE, [*EVALUATE, "--health"], JUDGE, BENCH])
def test_force_replaces_outputs(home: Path, command: list[str]) -> None:
    name = command[0]
    paths = [home / "old" / f"{name}.json", home / "old" / f"{name}.page"]
    plots = sorted(path.name for path in (home / "old" / "plots").iterdir())
    before = [path.stat().st_ino for path in paths]
    outputs = ["--json", str(paths[0]), "--report", str(paths[1]), "--plots", "old/plots", "--device", "cpu"]
    assert main([*command, *outputs, "--force"]) == 0
    assert all(path.stat().st_ino != inode for path, inode in zip(paths, before, strict=True))
    assert sorted(path.name for path in (home / "old" / "plots").iterdir()) == plots


def test_a_list_of_rows_is_added_to_without_force(home: Path) -> None:
    before = json.loads((home / "old" / "bench.json").read_text())
    more = ["bench", "prefill", "--sizes", "toy", "--methods", "full", *BENCH[6:], "--device", "cpu"]
    assert main([*more, "--json", "old/bench.json"]) == 0
    rows = json.loads((home / "old" / "bench.json").read_text())
    assert rows[: len(before)] == before
    assert len(rows) > len(before)


def test_a_session_goes_on_in_its_own_file_and_an_empty_file_is_no_loss(home: Path) -> None:
    (home / "empty").touch()
    outputs = ["--json", "new.json", "--report", "empty", "--device", "cpu"]
    assert main([*READ, "--session", "old/session", "--save", "./old/../old/session", *outputs]) == 0
    assert json.loads((home / "new.json").read_text())["results"][0]["tokens"] == len(TEXT)
    assert (home / "empty").read_text().startswith("<!doctype html>")
    before = (home / "old" / "session").read_bytes()
    assert main([*GENERATE, "--device", "cpu", "--session", "old/session", "--save", "old/session"]) == 0
    assert (home / "old" / "session").read_bytes() != before


def test_a_file_that_is_no_session_is_not_gone_on_with(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--resume reads the file of --save before it is written, so what is no session stays."""
    for there in ("old/evaluate.json", "model/model.safetensors"):
        assert there in refused(capsys, home, *READ, "--save", there, "--resume")


def test_a_place_that_takes_no_file_is_said_before_the_work(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its permissions do not tell: the file system of /proc lets root write, and holds no new file."""
    sentence = refused(capsys, home, *READ, "--save", "/proc/x/y")
    assert sentence == "cannot write /proc/x/y: /proc is not a directory that may be written to; choose another"


# Numbers that can only be slips.


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([*NEEDLE, "--contexts", "99999999999"], "--contexts 99999999999 is more than 16777216 tokens; lower it"),
        ([*NEEDLE, "--contexts", "512", "2000000000"], "--contexts 2000000000 is more than 16777216 tokens; lower it"),
        (
            [*NEEDLE, "--samples", "99999999999"],
            "--samples 99999999999 at every depth and context makes prompts of 39999999999600 tokens in all, more than",
        ),
        ([*NEEDLE, "--max-tokens", "99999999999"], "--max-tokens 99999999999 is more than 65536 tokens; lower it"),
        ([*JUDGE, "--context", "99999999999992"], "--context 99999999999992 is more than 16777216 tokens; lower it"),
        (
            [*JUDGE, "--bins", "1"],
            "--bins 1 has no border behind the 32 of 64 tokens that are read; give 2, or read another share",
        ),
        ([*JUDGE, "--bins", "10"], "--context 64 does not divide into --bins 10; give a multiple, 70"),
        ([*EVALUATE, "--lengths", str(10**20)], f"--lengths {10**20} is more than 1099511627776 tokens; lower it"),
        ([*EVALUATE, "--indices", str(10**20)], f"--indices {10**20} is more than 1099511627776 tokens; lower it"),
        ([*EVALUATE, "--window", str(10**20)], f"--window {10**20} is more than 16777216 tokens; lower it"),
        ([*EVALUATE, "--mini-batch", str(10**20)], f"--mini-batch {10**20} is more than 16777216 tokens; lower it"),
        ([*BENCH, "--repeats", "99999999"], "--repeats 99999999 is more than 1000 measurements; lower it"),
        (
            ["prepare", "texts", "--out", "new", "--train-tokenizer", "99999999999"],
            "--train-tokenizer 99999999999 is more than 1048576 entries; lower it",
        ),
    ],
)
def test_numbers_that_can_only_be_slips(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    reason: str,
) -> None:
    """Said before a model is opened, or anything as large as the number is made."""
    monkeypatch.setattr("longread.loading.open_model", lambda *_: pytest.fail("a model was opened"))
    assert reason in refused(capsys, home, *arguments)


# Options that need each other, and help.


def test_a_judge_without_a_tokenizer(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "hf").mkdir()
    (home / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    sentence = refused(capsys, home, "judge", "model", "--judge", "hf", "--data", "texts", "--context", "64")
    assert sentence == "hf has no tokenizer.json beside it; copy there the one it was trained with"


def test_draft_tokens_belong_to_a_draft(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(capsys, home, *GENERATE, "--draft-tokens", str(DRAFT_TOKENS))
    assert sentence == "--draft-tokens belongs to --draft; give the model that guesses"


def shown(capsys: pytest.CaptureFixture[str], command: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_names_every_recipe_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "train")
    assert all(f" {name}" in page.replace(",", " ") for name in (*RECIPES, *typing.get_args(Method)))


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("--max-tokens", "(default 200)"),
        ("--temperature", "(default 1)"),
        ("--top-p", "(default 1: from all)"),
        ("--top-k", "(default: from all)"),
        ("--repetition-penalty", "(default 1: nothing changes)"),
        ("--seed", "(default: another each time)"),
        ("--draft-tokens", f"(default {DRAFT_TOKENS})"),
    ],
)
def test_help_gives_meaning_and_default(capsys: pytest.CaptureFixture[str], option: str, default: str) -> None:
    options = shown(capsys, "generate").partition("options:")[2]
    about = options.partition(f" {option} ")[2].partition(" --")[0]
    assert default in about
    assert len(about.replace(default, "").split()) > 3


def test_models_named_alike_are_numbered() -> None:
    assert table_names(["a/m", "b/m", "n", "a/m"]) == ["m 1", "m 2", "n", "m 3"]


def test_progress_says_how_many_of_all_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Status, "update", lambda status, text: said.append(text))
    with counted(Console(file=io.StringIO()), "runs/e2e", 1200, "needles, frozen") as show:
        show(8)
        show(1000)
    assert said == [f"runs/e2e: {done} of 1,200 needles, frozen" for done in ("8", "1,008")]
