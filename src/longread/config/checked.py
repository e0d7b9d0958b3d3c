"""The base of every config: construction from plain data, checks of types, and the errors of wrong values."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Self


class UserError(ValueError):
    """Something the user gave is wrong. The message is one sentence: the value, the limit, the remedy."""


class TrainingHalted(UserError):
    """Numbers are not finite, or the run diverges. The message says what, when, what is left, and what to try."""

    exit_status = 3


class Checked:
    """Shared by every config: construction from plain data, with unknown or mistyped fields refused."""

    _path = ""  # of this config in a `RunConfig`, so that messages name a field as `--set` takes it

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config from what `dataclasses.asdict` gave. Raises `UserError` on unknown or wrong fields."""
        if not isinstance(values, dict):
            raise UserError(f"{cls.__name__} needs a table of fields, not {values!r}")
        types_ = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        made = {}
        for name, value in values.items():
            made[name] = _as_field(value, types_[name])
        try:
            return cls(**made)
        except TypeError as error:
            raise UserError(f"{cls.__name__}: {error}") from None

    def as_dict(self, *, complete: bool = False) -> dict[str, Any]:
        """The fields as `from_dict` takes them. One that is `later` than the format is left out at its default, so
        that files, and what is made of them, stay what they were; unless they are to be `complete`."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if complete or not f.metadata.get("later") or getattr(self, f.name) != f.default
        }
        return {name: _plain(value, complete) for name, value in values.items()}

    def __post_init__(self) -> None:
        for name, type_ in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is_a(value, type_):
                raise UserError(f"{self._path}{name} is {value!r}; it must be {_describe(type_)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{self._path}{name} is {value}; it must be a finite number")
        self._check()

    def _check(self) -> None:
        """Overridden: relations between fields."""

    def _at_least(self, limit: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < limit:
                raise UserError(f"{self._path}{name} is {value}; it must be at least {limit}")


def _as_field(value: Any, type_: Any) -> Any:
    """A field as the class has it, from what a JSON or TOML file can say."""
    for option in typing.get_args(type_) or (type_,):
        if isinstance(option, type) and issubclass(option, Checked) and isinstance(value, dict):
            return option.from_dict(value)
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(value)
    return value


def _plain(value: Any, complete: bool) -> Any:
    if isinstance(value, Checked):
        return value.as_dict(complete=complete)
    return list(value) if isinstance(value, tuple) else value


def _is_a(value: Any, type_: Any) -> bool:
    origin = typing.get_origin(type_)
    if origin is Literal:
        return value in typing.get_args(type_)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, typing.get_args(type_)[0]) for item in value)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(type_))
    if type_ is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if type_ is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type_)


def _describe(type_: Any) -> str:
    if typing.get_origin(type_) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(type_)))
    if typing.get_origin(type_) is tuple:
        return f"a list, each {_describe(typing.get_args(type_)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    options = typing.get_args(type_) or (type_,)
    return " or ".join(names.get(x) or (_describe(x) if typing.get_args(x) else x.__name__) for x in options)
