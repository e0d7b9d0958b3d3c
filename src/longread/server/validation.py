"""What is wrong with a request, as one sentence: the value, the limit, the remedy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 60
"""Characters of a value that are shown."""
_NEEDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "a text that matches {pattern}",
}
"""What a value must be, by the type of pydantic's error, or by how that begins."""
_UNIONS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text, or a list of texts",
    "content": "a text, or a list of text parts",
    "input": "a text, or a list of messages",
    "conversation": "an id, or an object with one",
}
"""What a value of several types may be, by the argument's name."""


def cause(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first thing that is wrong, of all that pydantic found: of a value of several types, with the likeliest."""
    return _nearest(errors) if len(_alternatives(errors)) > 1 else errors[0]


def explained(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The sentence about what pydantic found, and the argument that it is about, None for the whole body."""
    place, several, error = _place(errors[0]), len(_alternatives(errors)) > 1, cause(errors)
    name, kind = _name(_place(error)), error["type"]
    if several and len(_place(error)) == len(place) and place and place[-1] in _UNIONS:
        return f"{name} is {_shown(error['input'])}; it must be {_UNIONS[str(place[-1])]}", name
    if not name:
        return _whole(error), None
    if kind == "missing":
        return f"{name} is missing; this request needs it", name
    return f"{name} {_reason(kind, error)}", name


def unknown_argument(errors: Sequence[Mapping[str, Any]]) -> str | None:
    """The argument that there is not, if the first thing wrong is one."""
    error = cause(errors)
    return _clean(str(error["loc"][-1])) if error["type"] == "extra_forbidden" else None


def _whole(error: Mapping[str, Any]) -> str:
    """Of the body itself."""
    if error["type"] == "missing":
        return "the body is missing; send a JSON object"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "string_unicode":  # of an argument's name
        return f"there is no argument {_shown(error['input'])}; leave it out"
    return f"the body is {_shown(error['input'])}; it must be an object"


def _reason(kind: str, error: Mapping[str, Any]) -> str:
    context = error.get("ctx", {})
    value = _shown(error["input"])
    if kind == "value_error":
        return f"is {value}; {context['error']}"
    if "reason" in context:
        return f"is {value}; {context['reason']}"
    if kind.endswith(("too_long", "too_short")):
        unit = "characters" if kind.startswith("string") else "entries"
        limit = f"most {context['max_length']}" if kind.endswith("long") else f"least {context['min_length']}"
        return f"has {len(error['input'])} {unit}; it must have at {limit}"
    need = _NEEDS.get(kind) or (None if kind == "string_unicode" else _NEEDS.get(kind.partition("_")[0]))
    if need is None:
        return f"is {value}; {error['msg'][:1].lower()}{error['msg'][1:]}"
    limits = {name: f"{limit:.15g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    return f"is {value}; it must be {need.format(**limits)}"


def _alternatives(errors: Sequence[Mapping[str, Any]]) -> set[str]:
    """The types, as pydantic calls them, that a value was tried as, of the argument that the first error is about."""
    first = _place(errors[0])
    return {
        str(error["loc"][i])
        for error in errors
        for i in range(len(error["loc"]))
        if _is_type(error["loc"], i) and _place(error)[:1] == first[:1]
    }


def _nearest(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The error that got furthest into the value: of the type that was most probably meant."""
    about = [error for error in errors if _place(error)[:1] == _place(errors[0])[:1]]
    return max(about, key=lambda error: len(_place(error)))


def _is_type(place: Sequence[str | int], i: int) -> bool:
    """Whether a part of a place says which type was tried; such a part follows an argument's name or a number."""
    part = str(place[i])
    return i > 1 and (part in ("str", "int", "float", "bool") or "[" in part)


def _place(error: Mapping[str, Any]) -> list[str | int]:
    """Names and numbers that lead to a value."""
    loc = error["loc"]
    return [loc[i] for i in range(len(loc)) if i and not _is_type(loc, i)]


def _name(place: Sequence[str | int]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return _clean("".join(parts).removeprefix("."))


def _shown(value: Any) -> str:
    match value:
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case _:
            text = json.dumps(value, ensure_ascii=False, default=str)
    return _clean(text)


def _clean(text: str) -> str:
    """As much of a client's own words as can be sent back: half a surrogate pair cannot."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
