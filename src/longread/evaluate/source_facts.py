"""What Python source tells: which function does what, where a message or a method is, bases of classes, defaults.

| kind | the question names | the answer |
|---|---|---|
| docstring | the first line of a docstring, at least four words | the function |
| message | a string in an expression, at least four words | the function around it |
| method | a method that one class alone defines | the class |
| base | a class with one base | the base |
| default | a function and its parameter | the default value, if it is not None, True or False |

What is named stands in the source once.
"""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np

from longread.evaluate.facts import TextFact

_LONGEST_MESSAGE, _LONGEST_VALUE = 100, 24
"""Characters."""
_LEAST_WORDS = 4
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_ABOUT = "\n\n# In the code above, the "


def source_facts(text: str, num_bytes: int) -> list[TextFact] | None:
    """All facts of these kinds in the first `num_bytes` bytes of Python source; None where a text is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings, say
            source = _Source(text, ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not source.classes and not source.functions:
        return None
    found = [*_docstrings(source), *_messages(source), *_methods(source), *_bases(source), *_defaults(source)]
    return [fact for fact in found if fact.evidence_end <= num_bytes]


class _Source:
    """A parsed text, and where in it things are: the parser counts lines, and bytes in them."""

    def __init__(self, text: str, tree: ast.Module) -> None:
        self._bytes = text.encode()
        self._line_starts = np.cumsum([0, *map(len, self._bytes.splitlines(keepends=True))]).tolist()
        self.classes: list[ast.ClassDef] = []
        self.functions: list[_Function] = []
        self.strings: list[tuple[ast.Constant, str]] = []
        """Those that are part of an expression, and the name of the innermost function around each."""
        self._collect(tree, None)
        self.times_defined = Counter(node.name for node in (*self.classes, *self.functions))

    def _collect(self, node: ast.AST, function: str | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.JoinedStr) or (
                isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            ):
                continue  # pieces of a string, or a docstring
            if isinstance(child, ast.ClassDef):
                self.classes.append(child)
            elif isinstance(child, _Function):
                self.functions.append(child)
            elif isinstance(child, ast.Constant) and isinstance(child.value, str) and function:
                self.strings.append((child, function))
            self._collect(child, child.name if isinstance(child, _Function) else function)

    def is_unique(self, name: str) -> bool:
        return self.times_defined[name] == 1

    def end(self, node: ast.expr) -> int:
        """Bytes up to the end of an expression."""
        return int(self._line_starts[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0))

    def written(self, node: ast.expr) -> str:
        """An expression as the text has it."""
        return self._bytes[self._line_starts[node.lineno - 1] + node.col_offset : self.end(node)].decode()

    def line_end(self, number: int) -> int:
        """Bytes up to the end of a line, counted from 1."""
        return int(self._line_starts[number])


def _says_something(text: str) -> bool:
    return len(text.split()) >= _LEAST_WORDS and len(text) <= _LONGEST_MESSAGE and text.isprintable()


def _docstrings(source: _Source) -> Iterator[TextFact]:
    found = [(node, (ast.get_docstring(node, clean=False) or "").partition("\n")[0]) for node in source.functions]
    times = Counter(line for _, line in found)
    for node, line in found:
        if _says_something(line) and times[line] == 1:
            question = f"{_ABOUT}function with the docstring {line.strip()!r} is"
            yield TextFact("docstring", source.line_end(node.body[0].lineno), question, f" {node.name}", "function")


def _messages(source: _Source) -> Iterator[TextFact]:
    times = Counter(node.value for node, _ in source.strings)
    for node, function in source.strings:
        if _says_something(str(node.value)) and times[node.value] == 1:
            question = f"{_ABOUT}message {node.value!r} is in the function"
            yield TextFact("message", source.end(node), question, f" {function}", "function")


def _methods(source: _Source) -> Iterator[TextFact]:
    for node in source.classes:
        for method in node.body:
            if isinstance(method, _Function) and source.is_unique(method.name) and source.is_unique(node.name):
                question = f"{_ABOUT}method {method.name}() is defined in the class"
                yield TextFact("method", source.line_end(method.lineno), question, f" {node.name}", "class")


def _bases(source: _Source) -> Iterator[TextFact]:
    for node in source.classes:
        base = node.bases[0] if len(node.bases) == 1 else None
        if isinstance(base, ast.Name | ast.Attribute) and source.is_unique(node.name):
            question = f"{_ABOUT}class {node.name} is derived from the class"
            yield TextFact("base", source.end(base), question, f" {source.written(base)}", "class")


def _defaults(source: _Source) -> Iterator[TextFact]:
    for node in source.functions:
        positional = [*node.args.posonlyargs, *node.args.args]
        optional = [*positional[len(positional) - len(node.args.defaults) :], *node.args.kwonlyargs]
        for parameter, default in zip(optional, [*node.args.defaults, *node.args.kw_defaults], strict=True):
            if not isinstance(default, ast.Constant | ast.Name | ast.Attribute) or not source.is_unique(node.name):
                continue
            value = source.written(default)
            if value not in ("None", "True", "False", "...") and len(value) <= _LONGEST_VALUE:
                question = f"{_ABOUT}default value of the parameter {parameter.arg} of {node.name}() is"
                yield TextFact("default", source.end(default), question, f" {value}", "value")
