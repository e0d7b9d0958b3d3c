"""The library's files as Python reads them: what each imports, import cycles, and classes of one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """One imported module: absolute dotted name, line, and whether it waits until a function runs."""

    module: str
    line: int
    deferred: bool
    names: tuple[str, ...] = ()
    """Taken from it; each may be a module of its own."""


class Source:
    """One file of the library.

    Args:
        package: the directory `longread`.
        path: of the file, in it.
    """

    def __init__(self, package: Path, path: Path, text: str) -> None:
        self.name = path.relative_to(package).as_posix()
        self.unit = Path(self.name).parts[0].removesuffix(".py")
        self.lines = text.count("\n")
        self.tree = ast.parse(text)

    @property
    def package(self) -> list[str]:
        """The dotted package that relative imports start from."""
        return ["longread", *Path(self.name).parent.parts]

    @property
    def classes(self) -> list[str]:
        """The names of its classes, private ones too."""
        return [node.name for node in self.nodes if isinstance(node, ast.ClassDef)]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of its syntax tree."""
        return list(ast.walk(self.tree))

    @cached_property
    def imports(self) -> list[Import]:
        """Those inside functions and those for type checkers included."""
        return list(self._imports(self.tree, deferred=False))

    def _imports(self, node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = self.package[: len(self.package) - node.level + 1]
                base = ".".join([*start, base] if base else start)
            names = tuple(alias.name for alias in node.names)
            if base == "longread":
                yield from (Import(f"longread.{name}", node.lineno, deferred) for name in names)
            else:
                yield Import(base, node.lineno, deferred, names)
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "importlib.import_module", "__import__"}:
            yield Import(_named(node.args[0]), node.lineno, deferred)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from self._imports(child, deferred or inside or type_checking)


def _named(module: ast.expr) -> str:
    """What `import_module` is given; of f"longread.a.{b}" the package."""
    if isinstance(module, ast.JoinedStr):
        module = module.values[0]
        if isinstance(module, ast.Constant) and str(module.value).endswith("."):
            return str(module.value).rstrip(".")
    return str(module.value) if isinstance(module, ast.Constant) else "<computed>"


def called(node: ast.Call) -> str:
    """What a call calls, as it is written."""
    return ast.unparse(node.func)


@cache
def sources(package: Path) -> dict[str, Source]:
    """All files of the library by their names, but `__init__.py` and `__main__.py` above all units."""
    files = [path for path in sorted(package.rglob("*.py")) if path.parent != package or path.name[0] != "_"]
    return {source.name: source for source in (Source(package, path, path.read_text("utf-8")) for path in files)}


def imported_files(files: Mapping[str, Source]) -> dict[str, set[str]]:
    """By file those whose names it imports. That Python runs the `__init__.py` on the way there does not count."""

    def file_of(module: str) -> str | None:
        stem = "/".join(module.split(".")[1:])
        return next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in files), None)

    found: dict[str, set[str]] = {}
    for name, file in files.items():
        given = [i for i in file.imports if i.module.split(".")[0] == "longread"]
        modules = {file_of(f"{i.module}.{taken}") or file_of(i.module) for i in given for taken in i.names or ("",)}
        modules |= {file_of(i.module) for i in given if not i.names}
        found[name] = {module for module in modules if module not in (None, name)}  # type: ignore[misc]
    return found


def import_cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The files that import one another, directly or by others: each list is one strongly connected component."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for following in graph.get(waiting.pop(), set()) - seen:
                seen.add(following)
                waiting.append(following)
        reached[start] = seen
    components = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return [list(each) for each in sorted(components)]


def doubled_classes(files: Mapping[str, Source]) -> dict[str, list[str]]:
    """The files of each class name that stands more than once; twins of one op count as one."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, file in files.items():
        for each in file.classes:
            places[each].append(name)
    homes = {each: {_home(name) for name in names} for each, names in places.items()}
    return {each: names for each, names in sorted(places.items()) if len(names) > 1 and len(homes[each]) > 1}


def _home(name: str) -> str:
    """An op's folder holds one contract in several implementations; elsewhere a file stands for itself."""
    parts = Path(name).parts
    return "/".join(parts[:2]) if parts[0] == "ops" and len(parts) == 3 else name
