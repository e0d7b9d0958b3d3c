"""What pip installs: the wheel of the source distribution, in an environment that knows no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("src", "models", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
TEXT = "The house stood on a hill. Nobody had lived there for years, or so they said in the village below.\n" * 60
BREAK = "\f"
RUN = f"""
import runpy, sys
import longread, longread.loading
from longread.cli import demo
command = sys.argv[1]
print(longread.__file__, *longread.loading.boxed_models().values())
demo.CONTINUATION = 4
for arguments in ("demo book.txt --tokens 1100", "read note.txt --json -"):
    print({BREAK!r}, flush=True)
    sys.argv = [command, *arguments.split()]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, arguments
"""
"""In one process, as importing torch takes longer than all else: where things are, and what the command says."""


def python(*arguments: object, cwd: Path, executable: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    """Runs Python, in an environment without a word about a checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(executable), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy of this checkout: building leaves files behind."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy)
    python("-c", f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})", cwd=copy)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel, and with what else is installed here."""
    home = tmp_path_factory.mktemp("installed")
    with tarfile.open(sdist) as archive:
        archive.extractall(home, filter="data")
    (source,) = home.iterdir()
    python("-c", f"import setuptools.build_meta as b; b.build_wheel({str(home)!r})", cwd=source)
    venv.create(home / "venv", symlinks=True)
    pip = ["-m", "pip", "--disable-pip-version-check", "--python", home / "venv"]
    python(*pip, "install", "--no-compile", "--no-index", "--no-deps", next(home.glob("*.whl")), cwd=home)
    (place,) = (home / "venv").glob("lib/python*/site-packages")
    (place / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home / "venv" / "bin"


def test_the_source_distribution_holds_the_models(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    models = {path.relative_to(ROOT).as_posix() for path in (ROOT / "models").rglob("*") if path.is_file()}
    assert models < names
    assert not [name for name in names if name.startswith("src/longread/box")]


def test_the_wheel_has_something_to_run(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "note.txt").write_text(TEXT[:1500], encoding="utf-8")
    done = python("-c", RUN, installed / "longread", cwd=tmp_path, executable=installed / "python")
    places, shown, figures = done.stdout.split(BREAK)
    assert all(place.startswith(str(installed.parent)) for place in places.split())
    box = Path(places.split()[1])
    assert sorted(path.name for path in box.iterdir()) == sorted(x.name for x in (ROOT / "models" / box.name).iterdir())

    assert "Learning gains" in shown
    learning, frozen = json.loads(figures)["results"]
    assert (learning["model"], learning["reading"], frozen["reading"]) == ("longread-small", "learning", "frozen")
    assert done.stderr.count("with the model longread-small") == 2
