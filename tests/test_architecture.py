"""The house rules of docs/architecture.md, checked against every file of src/longread."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from longread.extras import PACKAGES
from tests.sources import Source, called, doubled_classes, import_cycles, imported_files, sources

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "longread"
FILES = sorted(PACKAGE.rglob("*.py"))
UNITS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__"})
FORBIDDEN_NAMES = {"util", "utils", "common", "helper", "helpers", "misc"}
FORBIDDEN_PACKAGES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MOST_LINES, MOST_MEDIAN_LINES = 500, 220


def table(path: Path, first_header: str) -> list[dict[str, str]]:
    """The rows of the Markdown table whose first column is called `first_header`; backticks are dropped."""
    rows = [[cell.strip(" `") for cell in line.strip().strip("|").split("|")] for line in path.read_text().splitlines()]
    start = next(i for i, row in enumerate(rows) if row[0] == first_header and len(row) > 1)
    body = []
    for row in rows[start + 2 :]:
        if len(row) != len(rows[start]):
            break
        body.append(dict(zip(rows[start], row, strict=True)))
    return body


ARCHITECTURE = ROOT / "docs" / "architecture.md"
ROW_OF = {line["unit"]: int(line["row"]) for line in table(ARCHITECTURE, "row")}
PACKAGES_OF = {line["unit"]: set(re.findall(r"\w+", line["packages"])) for line in table(ARCHITECTURE, "row")}
OPTIONAL = {line["package"]: line for line in table(ARCHITECTURE, "package")}


@cache
def source(path: Path) -> Source:
    known = sources(PACKAGE).get(path.relative_to(PACKAGE).as_posix())
    return known or Source(PACKAGE, path, path.read_text(encoding="utf-8"))


def violations_of_rows(file: Source) -> list[str]:
    """Every import of `file` that the table of rows does not allow."""
    found = []
    for module, line, deferred, _ in file.imports:
        where, (top, _, rest) = f"{file.name}:{line}", module.partition(".")
        target = rest.partition(".")[0]
        if top == "longread":
            if target == file.unit or target == "__version__":
                continue
            if target not in ROW_OF:
                found.append(f"{where} imports {module}, which is no unit of the table")
            elif ROW_OF[target] >= ROW_OF[file.unit]:
                found.append(f"{where} {file.unit} (row {ROW_OF[file.unit]}) imports {target} (row {ROW_OF[target]})")
            elif file.unit == "ops":
                found.append(f"{where} ops imports {target}; it may import torch and triton only")
        elif top in OPTIONAL and top not in PACKAGES_OF[file.unit]:
            if file.name != OPTIONAL[top]["file"]:
                found.append(f"{where} imports {top}; it may enter in {OPTIONAL[top]['file']} only")
            if not deferred:
                found.append(f"{where} imports {top} at the top; import it in the function that needs it")
        elif top not in sys.stdlib_module_names and top not in PACKAGES_OF[file.unit]:
            found.append(f"{where} imports {module}; {file.unit} may import {sorted(PACKAGES_OF[file.unit])}")
    return found


def test_every_unit_has_a_row_and_every_row_a_unit() -> None:
    assert sorted(ROW_OF) == UNITS


def test_imports_point_one_way() -> None:
    assert [violation for file in sources(PACKAGE).values() for violation in violations_of_rows(file)] == []


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("config/run.py", "import torch\n", "config may import"),
        ("recipes.py", "from .tokenizer import ByteTokenizer\n", "recipes (row 1) imports tokenizer (row 1)"),
        ("model/layers.py", "def f():\n    from ..session import Session\n", "model (row 2) imports session (row 4)"),
        ("model/mixers/a.py", "from ...inner_loop import read\n", "model (row 2) imports inner_loop (row 3)"),
        ("ops/a/b.py", "from ...config import UserError\n", "may import torch and triton only"),
        ("ops/a/b.py", "import numpy\n", "ops may import ['torch', 'triton']"),
        ("session.py", "import longread.train\n", "session (row 4) imports train (row 6)"),
        ("session.py", "from longread import Session\n", "no unit of the table"),
        ("session.py", "import importlib\nimportlib.import_module('longread.cli')\n", "imports cli (row 8)"),
        ("session.py", "import importlib\nimportlib.import_module(f'longread.cli.{x}')\n", "imports cli (row 8)"),
        ("session.py", "import importlib\nimportlib.import_module(f'longread.{x}')\n", "no unit of the table"),
        ("session.py", "import importlib\nimportlib.import_module(x)\n", "imports <computed>"),
        ("train.py", "def f():\n    import wandb\n", "may enter in record"),
        ("evaluate/plots.py", "import matplotlib.pyplot\n", "import it in the function"),
    ],
)
def test_the_import_rule_catches(name: str, text: str, reason: str) -> None:
    assert any(reason in violation for violation in violations_of_rows(Source(PACKAGE, PACKAGE / name, text)))


def test_no_two_files_import_each_other() -> None:
    """Imports inside functions and for type checkers count too: whoever reads one file would need the other first."""
    assert import_cycles(imported_files(sources(PACKAGE))) == []


def test_no_class_name_stands_twice() -> None:
    """The implementations of one op, which share a contract, may name their parts alike."""
    assert doubled_classes(sources(PACKAGE)) == {}


def written(*files: tuple[str, str]) -> dict[str, Source]:
    return {name: Source(PACKAGE, PACKAGE / name, text) for name, text in files}


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        (
            [("a/b.py", "from longread.a.c import f"), ("a/c.py", "def g():\n    from longread.a import b")],
            ["a/b", "a/c"],
        ),
        (
            [("a/b.py", "from . import c"), ("a/c.py", "import longread.a.d"), ("a/d.py", "from .b import f")],
            ["a/b", "a/c", "a/d"],
        ),
        (
            [("a/__init__.py", "from longread.a.b import f"), ("a/b.py", "from longread.a import g")],
            ["a/__init__", "a/b"],
        ),
        ([("a/b.py", "if TYPE_CHECKING:\n    from .c import D"), ("a/c.py", "from .b import e")], ["a/b", "a/c"]),
    ],
)
def test_the_rule_of_cycles_catches(files: list[tuple[str, str]], cycle: list[str]) -> None:
    assert import_cycles(imported_files(written(*files))) == [[f"{name}.py" for name in cycle]]


def test_the_rule_of_cycles_allows() -> None:
    """A package that gives out the names of its files, which import one another in one direction."""
    files = [("a/__init__.py", "from longread.a.b import f"), ("a/b.py", "from longread.a.c import D")]
    assert import_cycles(imported_files(written(*files, ("a/c.py", "from longread import __version__")))) == []


def test_the_rule_of_class_names() -> None:
    files = written(
        ("a.py", "class A:\n    class _B: ..."),
        ("b/c.py", "def f():\n    class _B: ..."),
        ("ops/d/explicit.py", "class _E: ..."),
        ("ops/d/triton.py", "class _E: ..."),
        ("ops/f/__init__.py", "class _G: ..."),
        ("ops/h/triton.py", "class _G: ..."),
    )
    assert doubled_classes(files) == {"_B": ["a.py", "b/c.py"], "_G": ["ops/f/__init__.py", "ops/h/triton.py"]}


def test_the_import_rule_allows() -> None:
    text = "import math\nimport torch\nfrom . import layers\nfrom ..ops.attention import attention\n"
    text += "from longread.config import UserError\nfrom longread import __version__\n"
    assert violations_of_rows(Source(PACKAGE, PACKAGE / "model" / "transformer.py", text)) == []


def test_optional_packages_enter_where_the_table_says() -> None:
    for package, line in OPTIONAL.items():
        entries = {i.module.partition(".")[0] for i in source(PACKAGE / line["file"]).imports}
        assert package in entries, f"{line['file']} does not import {package}"


def test_every_optional_package_is_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {line["extra"] for line in OPTIONAL.values()} == set(extras) - {"test"}
    for package, line in OPTIONAL.items():
        assert any(re.match(rf"{package}\b", requirement) for requirement in extras[line["extra"]])


def test_every_extra_says_what_installs_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    del extras["test"]
    assert {extra: " ".join(re.split("[<>=]", x)[0] for x in given) for extra, given in extras.items()} == PACKAGES


def test_files_stay_small() -> None:
    sizes = {path: source(path).lines for path in FILES if "triton" not in path.relative_to(PACKAGE).as_posix()}
    assert {path.name: n for path, n in sizes.items() if n > MOST_LINES} == {}
    assert statistics.median(sizes.values()) <= MOST_MEDIAN_LINES


def test_no_attic() -> None:
    parts = {part.removesuffix(".py") for path in FILES for part in path.relative_to(PACKAGE).parts}
    assert parts & FORBIDDEN_NAMES == set()


def violations_of_calls(file: Source) -> Iterator[str]:
    """Statements and calls that no file of the library may have."""
    for node in file.nodes:
        if isinstance(node, ast.Assert):
            yield f"{file.name}:{node.lineno} asserts; raise UserError or let it fail"
        elif isinstance(node, ast.Call):
            name, where = called(node), f"{file.name}:{node.lineno}"
            if name in {"torch.load", "torch.save"}:
                yield f"{where} calls {name}; files are safetensors and JSON"
            if name == "print" and file.unit != "cli":
                yield f"{where} prints; only cli does"
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) == "True" for k in node.keywords):
                yield f"{where} allows pickle"
    for package in {i.module.partition(".")[0] for i in file.imports} & FORBIDDEN_PACKAGES:
        yield f"{file.name} imports {package}"


def test_no_assert_print_or_pickle() -> None:
    assert [violation for file in sources(PACKAGE).values() for violation in violations_of_calls(file)] == []


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("cli/a.py", "def f():\n    assert True\n", "cli/a.py:2 asserts"),
        ("session.py", "torch.save(x, y)\n", "session.py:1 calls torch.save"),
        ("session.py", "print(x)\n", "session.py:1 prints"),
        ("data/a.py", "numpy.load(x, allow_pickle=True)\n", "data/a.py:1 allows pickle"),
        ("data/a.py", "def f():\n    import pickle\n", "data/a.py imports pickle"),
    ],
)
def test_the_rule_of_calls_catches(name: str, text: str, reason: str) -> None:
    (violation,) = violations_of_calls(Source(PACKAGE, PACKAGE / name, text))
    assert violation.startswith(reason)


def test_public_names_have_docstrings() -> None:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for path in FILES:
        tree = source(path).tree
        assert ast.get_docstring(tree), f"{path} has no docstring"
        public = [node for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")]
        assert [node.name for node in public if not ast.get_docstring(node)] == [], path


def test_import_is_lazy_and_every_public_name_resolves() -> None:
    program = "import sys, longread; assert 'torch' not in sys.modules\nfor n in longread.__all__: getattr(longread, n)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(PACKAGE.parent)})


def test_type_checkers_see_the_same_public_names() -> None:
    import longread

    block = next(node for node in source(PACKAGE / "__init__.py").tree.body if isinstance(node, ast.If))
    typed = {(node.module, alias.asname) for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert typed == {(f"longread.{module}", name) for module, names in longread._MODULES.items() for name in names}


def test_readme_tree_is_true() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("\nsrc/longread/") :].partition("```")[0]
    listed = set(re.findall(r"^  (\w+(?:\.py|/)) ", tree, flags=re.MULTILINE))
    there = {f"{unit}/" if (PACKAGE / unit).is_dir() else f"{unit}.py" for unit in UNITS}
    assert listed == there
