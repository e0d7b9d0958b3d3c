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
from typing import NamedTuple

import pytest

from longread.extras import PACKAGES

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


class Import(NamedTuple):
    """One imported module: absolute dotted name, line, and whether it waits until a function runs."""

    module: str
    line: int
    deferred: bool


class Source:
    """One file of the library."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.name = path.relative_to(PACKAGE).as_posix()
        self.unit = Path(self.name).parts[0].removesuffix(".py")
        self.lines = text.count("\n")
        self.tree = ast.parse(text)

    @property
    def package(self) -> list[str]:
        """The dotted package that relative imports start from."""
        return ["longread", *Path(self.name).parent.parts]

    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, deferred=False))

    def _imports(self, node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = self.package[: len(self.package) - node.level + 1]
                base = ".".join([*start, base] if base else start)
            if base == "longread":
                yield from (Import(f"longread.{alias.name}", node.lineno, deferred) for alias in node.names)
            else:
                yield Import(base, node.lineno, deferred)
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "importlib.import_module", "__import__"}:
            target = node.args[0]
            module = target.value if isinstance(target, ast.Constant) else "<computed>"
            yield Import(str(module), node.lineno, deferred)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from self._imports(child, deferred or inside or type_checking)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@cache
def source(path: Path) -> Source:
    return Source(path, path.read_text(encoding="utf-8"))


def violations_of_rows(file: Source) -> list[str]:
    """Every import of `file` that the table of rows does not allow."""
    found = []
    for module, line, deferred in file.imports():
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


UNIT_FILES = [path for path in FILES if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")]
each_file = pytest.mark.parametrize("path", UNIT_FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def test_every_unit_has_a_row_and_every_row_a_unit() -> None:
    assert sorted(ROW_OF) == UNITS


@each_file
def test_imports_point_one_way(path: Path) -> None:
    assert violations_of_rows(source(path)) == []


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
        ("train.py", "def f():\n    import wandb\n", "may enter in record"),
        ("evaluate/plots.py", "import matplotlib.pyplot\n", "import it in the function"),
    ],
)
def test_the_import_rule_catches(name: str, text: str, reason: str) -> None:
    assert any(reason in violation for violation in violations_of_rows(Source(PACKAGE / name, text)))


def test_the_import_rule_allows() -> None:
    text = "import math\nimport torch\nfrom . import layers\nfrom ..ops.attention import attention\n"
    text += "from longread.config import UserError\nfrom longread import __version__\n"
    assert violations_of_rows(Source(PACKAGE / "model" / "transformer.py", text)) == []


def test_optional_packages_enter_where_the_table_says() -> None:
    for package, line in OPTIONAL.items():
        entries = {i.module.partition(".")[0] for i in source(PACKAGE / line["file"]).imports()}
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


@each_file
def test_no_assert_print_or_pickle(path: Path) -> None:
    file = source(path)
    for node in ast.walk(file.tree):
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where} asserts; raise UserError or let it fail"
        if isinstance(node, ast.Call):
            name = called(node)
            assert name not in {"torch.load", "torch.save"}, f"{where} calls {name}; files are safetensors and JSON"
            assert name != "print" or file.unit == "cli", f"{where} prints; only cli does"
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) == "True" for k in node.keywords), where
    assert {i.module.partition(".")[0] for i in file.imports()} & FORBIDDEN_PACKAGES == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_names_have_docstrings(path: Path) -> None:
    tree = source(path).tree
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


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
