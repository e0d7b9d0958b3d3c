"""What the documents promise: commands that parse, targets, links, code and names that exist."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import longread
from longread.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDERS = ("docs", "models", "experiments", "benchmarks")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(page for folder in FOLDERS for page in sorted(ROOT.glob(f"{folder}/**/*.md"))),
]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are marked as `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """Every simple command of every bash block, split into words; pipes and redirections end a command."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
                words.whitespace_split = True
                command: list[str] = []
                for word in words:
                    if set(word) <= set("|&;<>"):
                        yield command
                        command = []
                    else:
                        command.append(word)
                if command:
                    yield command


COMMANDS = list(commands())
LONGREAD = sorted({shlex.join(words[1:]) for words in COMMANDS if words[0] == "longread"})
MAKE = sorted({target for words in COMMANDS if words[0] == "make" for target in words[1:] if "=" not in target})


def test_the_documents_show_every_command() -> None:
    assert {line.split()[0] for line in LONGREAD} >= {"prepare", "train", "read", "generate", "evaluate"}
    assert {"demo", "test"} <= set(MAKE)


@pytest.mark.parametrize("line", LONGREAD)
def test_the_command_line_understands(line: str) -> None:
    from longread.cli import build_parser

    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            build_parser().parse_args(shlex.split(line))
        except SystemExit:
            pytest.fail(f"longread {line}: {errors.getvalue()}")


@pytest.mark.parametrize("target", MAKE)
def test_make_has_the_target(target: str) -> None:
    assert target in TARGETS


def shown_after(page: Path, block: str) -> str | None:
    """The fenced text that follows a fenced block at once: what it printed."""
    rest = page.read_text().partition(f"{block}```\n")[2]
    found = re.match(r"\n```text\n(.*?)^```", rest, flags=re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def lines_of(output: str) -> list[str]:
    """The lines that are not empty, without the speeds in a last column."""
    lines = (re.sub(r" +[\d,]+ │$", " │", line.rstrip()) for line in output.splitlines())
    return [line for line in lines if line]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with the file that the README reads, on a machine that computes as the README's did."""
    if torch.cuda.is_available():
        pytest.skip("the README shows what a CPU computes")
    (tmp_path / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_the_python_of_the_readme_runs(block: str, reader: None, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    shown = shown_after(README, block)
    assert shown is None or capsys.readouterr().out == shown


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "attention.md", "python"))
def test_the_page_on_attention_checks_itself(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "attention.md", "exec"), {})
    assert capsys.readouterr().out == shown_after(ROOT / "docs" / "attention.md", block)


def test_the_readme_shows_what_reading_prints(reader: None, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in blocks(README, "bash") if "longread read LICENSE" in block)
    assert main(["read", "LICENSE"]) == 0
    shown, printed = lines_of(shown_after(README, block) or ""), lines_of(capsys.readouterr().out)
    number = r"\d+\.\d+"
    assert [re.sub(number, "#", line) for line in shown] == [re.sub(number, "#", line) for line in printed]
    figures = [[float(x) for x in re.findall(number, "\n".join(lines))] for lines in (shown, printed)]
    assert len(figures[0]) > 20
    assert figures[0] == pytest.approx(figures[1], abs=0.0021)  # another CPU rounds the last digit otherwise


def test_the_readme_says_how_frozen_weights_go_on(reader: None) -> None:
    opened = longread.open_model("longread-small")
    session = opened.session(learn=False)
    session.read(Path("LICENSE").read_text())
    text = "".join(session.write("\n\nIn short, the", max_tokens=12, temperature=0))
    assert f'go on with "{text.strip()}".' in README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    for name in set(re.findall(r"`(longread(?:\.\w+)+)`", page.read_text())):
        value: object = longread
        path = "longread"
        for part in name.split(".")[1:]:
            path += f".{part}"
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(path)
            assert hasattr(value, part), f"{page.name} speaks of {name}, which does not exist"
            value = getattr(value, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_one_version() -> None:
    assert f"version: {longread.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {longread.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_make_test_and_nothing_else() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert [line for line in lines if "make" in line] == ["exec make test"]
    assert not [line for line in lines if line and line.split()[0] not in {"set", "cd", "exec"}]


def test_installed_versions_are_exact_and_within_the_promised_ranges() -> None:
    pins = {}
    for name in ("demo.txt", "test.txt"):
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if not line.startswith("#"):
                package, version = line.split("==")
                pins[package.lower()] = version
    pins["torch"] = re.search(r"^TORCH = torch==(.+)$", MAKEFILE, flags=re.MULTILINE)[1]  # type: ignore[index]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = [extra for extra in extras if extra in extras["test"][0]]
    wanted = project["dependencies"] + extras["test"][1:] + [r for extra in tested for r in extras[extra]]
    for requirement in wanted:
        package, least = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        assert version_of(pins[package]) >= version_of(least), f"{requirement}, but {pins[package]} is installed"
    assert version_of(pins["torch"]) < (2, 14)


def version_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
