"""The fields of a hot request's body, each read by the reader that its name has in a table; types checked.

By hand, not by pydantic: a model of nested lists costs ten times the rest of the request.
Does not know: which fields there are, and ranges and widths, which are the engine's to check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from api.errors import shorten
from api.wire.tensors import RawTensor
from htm_service.errors import InvalidArgument, clipped

MAX_NESTING = 254
"""Levels of a payload that orjson writes."""

Reader = Callable[[str, Any], Any]
"""From a field's full name and its value to what the engine takes. Raises InvalidArgument."""


@dataclass(frozen=True, slots=True)
class Table:
    """The fields that an object may have: its `params`, and its `tensors`, which a binary body has beside them."""

    params: Mapping[str, Reader]
    tensors: Mapping[str, Reader]


class HotBody(NamedTuple):
    """One object's fields as they came. `tensors` is None in a JSON body, where tensors are fields like the others."""

    params: Mapping[str, Any]
    tensors: Mapping[str, RawTensor] | None
    where: str = ""
    """What stands before a field's name in a sentence."""

    def read(self, table: Table) -> dict[str, Any]:
        """The fields that are there, by name; one that is null counts as absent.

        Raises InvalidArgument for a field that the table does not have, or that its reader refuses.
        """
        readers = table.params if self.tensors is not None else {**table.params, **table.tensors}
        found = {}
        for name, value in self.params.items():
            reader = readers.get(name)
            if reader is None and (value is not None or name not in table.tensors):
                known = ", ".join(sorted(readers))
                raise InvalidArgument(f"unknown field {self.where}{clipped(name)}; known are {known}")
            if value is not None and reader is not None:
                found[name] = reader(self.where + name, value)
        if self.tensors is not None:
            for name, reader in table.tensors.items():
                if name in self.tensors:
                    found[name] = reader(self.where + name, self.tensors[name])
        return found

    def check_tensors(self, known: Set[str]) -> None:
        """Raises InvalidArgument for a tensor whose name is not known."""
        if self.tensors is not None and not self.tensors.keys() <= known:
            extra = min(self.tensors.keys() - known)
            raise InvalidArgument(f"unknown tensor {clipped(extra)}; known are {', '.join(known)}")

    def inner(self, name: str) -> HotBody:
        """The fields of an object that must be there; it shares the tensors."""
        value = self.params.get(name)
        if value is None:
            raise InvalidArgument(f"{name} is required")
        if not isinstance(value, dict):
            raise wrong(name, value, "an object")
        return HotBody(value, self.tensors, f"{name}.")


def integer(name: str, value: Any) -> int:
    """An integer."""
    if type(value) is int:
        return value
    raise wrong(name, value, "an integer")


def number(name: str, value: Any) -> float:
    """A number."""
    if type(value) in (int, float):
        return float(value)
    raise wrong(name, value, "a number")


def boolean(name: str, value: Any) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    raise wrong(name, value, "true or false")


def texts(name: str, value: Any) -> list[str]:
    """A list of strings."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise wrong(name, value, "a list of strings")


def mapping(name: str, value: Any) -> dict[str, str]:
    """An object of strings."""
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise wrong(name, value, "an object of strings")


def text(name: str, value: Any) -> str:
    """A string."""
    if isinstance(value, str):
        return value
    raise wrong(name, value, "a string")


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """A string out of `choices`."""
    if isinstance(value, str) and value in choices:
        return value
    raise wrong(name, value, f"one of {', '.join(choices)}")


def some_of(name: str, value: Any, choices: Sequence[str]) -> set[str]:
    """A list of strings out of `choices`, as a set."""
    if isinstance(value, list) and all(item in choices for item in value):
        return set(value)
    raise wrong(name, value, f"a list of {', '.join(choices)}")


def integers(name: str, value: Any) -> list[int]:
    """A list of integers."""
    if isinstance(value, list) and {int}.issuperset(map(type, value)):
        return value
    raise wrong(name, value, "a list of integers")


def payloads(name: str, value: Any) -> list[bytes | None]:
    """A list of JSON objects or null, as texts."""
    if not isinstance(value, list):
        raise wrong(name, value, "a list of objects or null")
    for at, item in enumerate(value):
        if item is not None and not isinstance(item, dict):
            raise wrong(f"{name}[{at}]", item, "an object or null")
    return [None if item is None else _payload(f"{name}[{at}]", item) for at, item in enumerate(value)]


def _payload(name: str, value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:  # it reads deeper than it writes
        raise InvalidArgument(f"{name} is nested more than {MAX_NESTING} levels deep") from error


def wrong(name: str, value: Any, expected: str) -> InvalidArgument:
    """What a field is, and what it must be."""
    return InvalidArgument(f"{name} is {shorten(value)}; it must be {expected}")
