"""One value of an option: the text of a flag or a JSON value → its type, and whether it is within the limits."""

import copy
import json
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Set, ValuesView
from enum import Enum
from typing import Any

import numpy as np
import torch

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
LONGEST = 200  # characters of a value in a message
LARGEST = 2**63 - 1  # tensors have no larger whole numbers
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a JSON object",
    list: "a list",
}


def to_json_value(value: Any) -> Any:
    """A value of a Python program as JSON has it, in a copy: paths, tuples, sets, generators, NumPy's numbers, dtypes.

    What JSON has no value for stays as it is.
    """
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return to_json_value(value.tolist())
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {to_json_value(key): to_json_value(entry) for key, entry in value.items()}
    if isinstance(value, Set):  # in an order that does not change from one start to the next
        return sorted(map(to_json_value, value), key=str)
    if isinstance(value, (list, tuple, range, Iterator, ValuesView)):
        return [to_json_value(entry) for entry in value]
    return copy.deepcopy(value)


def coerce(value: Any, kind: Any) -> Any:
    """Turn a flag's text or a JSON value into the annotated type `kind`. Raises `ValueError` with what is expected."""
    allowed = _alternatives(kind)
    if value is None or (isinstance(value, str) and (value == "null" or (value == "none" and str not in allowed))):
        if type(None) in allowed or str not in allowed:
            return None
        raise ValueError("a value is needed")
    for candidate in sorted(allowed, key=_trying_order):
        converted = _convert(value, candidate)
        if converted is not None:
            return converted
    raise ValueError(f"expected {describe_type(kind)}, got {shorten(value)}")


def shorten(value: Any) -> str:
    """A value in a message: not more of it than a reader needs to find it."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def describe_type(kind: Any) -> str:
    """An annotated type in words, such as "a list or text"; None is left out."""
    named = [candidate for candidate in _alternatives(kind) if candidate is not type(None)]
    return " or ".join(
        describe_choices(tuple(member.value for member in candidate))
        if _is_enum(candidate)
        else describe_choices(typing.get_args(candidate))
        if typing.get_origin(candidate) is typing.Literal
        else TYPE_NAMES.get(typing.get_origin(candidate) or candidate, str(candidate))
        for candidate in named
    )


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that an annotation allows. Where the values of an enum are listed, no other text is."""
    found = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return tuple(one for one in found if one is not str) if any(map(_is_enum, found)) else found


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _trying_order(kind: Any) -> int:
    """Narrow types first: text fits everything."""
    return {bool: 0, int: 1, float: 2, str: 4}.get(kind, 3)


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or None if it does not fit."""
    origin = typing.get_origin(kind) or kind
    if origin is bool:
        if isinstance(value, str):
            return True if value.lower() in TRUE else False if value.lower() in FALSE else None
        return value if isinstance(value, bool) else None
    if origin in (int, float):
        return _convert_number(value, origin)
    if origin in (dict, list):
        found = _convert_json(value, origin)
        is_of_texts = typing.get_args(kind) == (str,)
        return None if is_of_texts and not all(isinstance(entry, str) for entry in found or ()) else found
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else None
    if _is_enum(origin):
        return value if value in [member.value for member in origin] else None
    return value if isinstance(origin, type) and isinstance(value, origin) else None


def _convert_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if kind is float:
        return number
    if not number.is_integer():
        return None
    try:
        return int(value) if isinstance(value, (int, str)) else int(number)  # a float rounds large ones
    except ValueError:  # "1e3"
        return int(number)


def _convert_json(value: Any, kind: type) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {error}") from error
    return value if isinstance(value, kind) else None


def find_value_problems(values: Mapping[str, Any], limits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Problems of single values. `limits`: option → its choices and limits; see `option`."""
    given = {name: value for name, value in values.items() if value is not None}
    found = {name: _find_value_problem(value, limits.get(name, {})) for name, value in given.items()}
    return [f"{name}: {problem}" for name, problem in found.items() if problem]


def _find_value_problem(value: Any, limits: Mapping[str, Any]) -> str:
    """What is wrong with a value, or nothing."""
    if limits.get("choices"):
        return (
            ""
            if value in limits["choices"]
            else f"{shorten(value)} is unknown; use {describe_choices(limits['choices'])}"
        )
    lowest, highest, above, below = (limits.get(name) for name in ("minimum", "maximum", "above", "below"))
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, got {value}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"must be {'at most ' if value > 0 else 'at least -'}{LARGEST}, got {shorten(value)}"
    if lowest is highest is above is below is None or isinstance(value, str):  # auto
        return ""
    is_inside = (
        (lowest is None or value >= lowest)
        and (highest is None or value <= highest)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    named = {"at least": lowest, "above": above, "at most": highest, "below": below}
    bounds = " and ".join(f"{words} {limit}" for words, limit in named.items() if limit is not None)
    return "" if is_inside else f"must be {bounds}, got {value}"


def describe_choices(choices: tuple[Any, ...]) -> str:
    """Choices as a user writes them: "error, drop or truncate_text"."""
    words = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
