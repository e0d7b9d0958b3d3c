"""The faults: every place of a source file where one small change may alter what the program does."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "mean", "mean": "sum"}
NAMES |= {"amin": "amax", "amax": "amin", "sin": "cos", "cos": "sin", "zeros": "ones", "ones": "zeros"}
NAMES |= {"zeros_like": "ones_like", "ones_like": "zeros_like", "new_zeros": "new_ones", "new_ones": "new_zeros"}
PASSED_ON = {"detach", "clone"}  # methods whose object may take the place of their result
SAID = {"warn", "warning", "info", "debug", "print", "cast", "TypeVar", "getLogger", "save_for_backward"}
SILENT_KEYWORDS = {"strict", "stacklevel", "exist_ok", "non_blocking", "encoding", "slots", "pin_memory"}
SHOWN = {"__repr__", "__str__", "__dir__"}


@dataclass(frozen=True)
class Fault:
    """One change of one file: `source[start:end]`, in bytes, becomes `after`."""

    line: int
    last_line: int
    start: int
    end: int
    function: str
    kind: str
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """The changed source."""
        return source[: self.start] + self.after.encode() + source[self.end :]


class _Finder(ast.NodeVisitor):
    """Passes over what no test should pin down: annotations, docstrings, messages, warnings, how things are shown."""

    def __init__(self, source: bytes) -> None:
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.within: list[str] = []
        self.found: list[Fault] = []

    def _add(self, node: ast.expr | ast.stmt, kind: str, new: ast.AST | str) -> None:
        after = new if isinstance(new, str) else ast.unparse(new)
        if isinstance(node, ast.expr):
            after = f"({after})"
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        where = ".".join(self.within) or "(module)"
        self.found.append(Fault(node.lineno, node.end_lineno, start, end, where, kind, ast.unparse(node), after))

    def _changed(self, node: ast.expr | ast.stmt, kind: str, **fields: object) -> None:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        self._add(node, kind, new)

    def _visit_all(self, nodes: list[ast.expr] | list[ast.stmt]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if node.name in SHOWN:
            return
        self.within.append(node.name)
        if not isinstance(node, ast.ClassDef):
            self._visit_all([value for value in (*node.args.defaults, *node.args.kw_defaults) if value])
        self._visit_all(node.body)
        self.within.pop()

    visit_ClassDef = visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - names of ast

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        if node.exc is not None:
            self._add(node, "no raise", "pass")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts with values are messages."""

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self._negate(node.test)
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        """Unless another fault of the same test says the same."""
        equality = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], equality):
            return
        self._add(test, "condition", ast.UnaryOp(ast.Not(), test))

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) or (isinstance(node.value, ast.Call) and _name(node.value) in SAID):
            return
        if isinstance(node.value, ast.Call):
            self._add(node, "no call", "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Name) and target.id.startswith("__") for target in node.targets):
            return
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._add(node, "no assignment", "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add(node, "no assignment", "pass")
        if type(node.op) in OPERATORS:
            self._changed(node, "operator", op=OPERATORS[type(node.op)]())
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._add(node, "jump", "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._add(node, "jump", "break")

    def visit_BinOp(self, node: ast.BinOp) -> None:
        typed = isinstance(node.op, ast.BitOr) and not self.within  # `int | None`
        if type(node.op) in OPERATORS and not typed:
            self._changed(node, "operator", op=OPERATORS[type(node.op)]())
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._changed(node, "operator", op=OPERATORS[type(node.op)]())
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], OPERATORS[type(op)](), *node.ops[i + 1 :]]
            self._changed(node, "operator", ops=ops)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.operand, ast.Constant) and isinstance(node.op, ast.USub):
            if isinstance(node.operand.value, int | float):
                self._changed(node, "constant", operand=ast.Constant(_other(node.operand.value)))
            return
        if isinstance(node.op, ast.Not | ast.USub):
            self._add(node, "operator", node.operand)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool | int | float):
            self._add(node, "constant", ast.Constant(_other(node.value)))

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node)
        if name in SAID:
            return
        if name in NAMES:
            self._renamed(node, NAMES[name])
        if name in PASSED_ON and isinstance(node.func, ast.Attribute):
            self._add(node, "no call", node.func.value)
        for i, keyword in enumerate(node.keywords):
            if keyword.arg and keyword.arg not in SILENT_KEYWORDS:
                self._changed(node, "no argument", keywords=node.keywords[:i] + node.keywords[i + 1 :])
        self.generic_visit(node)

    def _renamed(self, node: ast.Call, name: str) -> None:
        func = copy.copy(node.func)
        setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", name)
        self._changed(node, "function", func=func)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in SILENT_KEYWORDS:
            self.visit(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self.within or not isinstance(node.ctx, ast.Load):  # outside of functions: a type
            self.generic_visit(node)


def _name(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _other(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 2 or 1.0


def faults(source: bytes) -> Iterator[Fault]:
    """Every fault of a file whose change can still be compiled."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    for fault in finder.found:
        try:
            compile(fault.apply(source), "mutant", "exec")
        except SyntaxError:
            continue
        yield fault
