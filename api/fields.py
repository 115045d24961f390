"""The fields of a hot request's body, taken one by one, types checked; what is left over is an error.

By hand, not by pydantic: a model of nested lists costs ten times the rest of the request.
Does not know: ranges and widths, which are the engine's to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from api import codec
from api.codec import RawTensor
from api.errors import shorten
from htm_service.errors import InvalidArgument
from htm_service.records import Bools, Floats

MAX_NESTING = 254
"""Levels of a payload that orjson writes."""


class Fields:
    """The fields of one object. `tensors` is None in a JSON body, where tensors are fields like the others.

    A field that is null counts as absent.
    """

    __slots__ = ("_params", "_taken", "_tensors", "_where")

    def __init__(self, params: Mapping[str, Any], tensors: Mapping[str, RawTensor] | None, where: str = "") -> None:
        self._params = params
        self._tensors = tensors
        self._where = where
        self._taken: set[str] = set()

    def _take(self, name: str) -> Any:
        self._taken.add(name)
        return self._params.get(name)

    def _tensor(self, name: str) -> Any:
        # In a binary body tensors are tensors only: left in the params, they are an unknown field.
        return self._take(name) if self._tensors is None else self._tensors.get(name)

    def floats(self, name: str) -> Floats:
        """A tensor that must be there."""
        value = self._tensor(name)
        if value is None:
            raise InvalidArgument(f"{self._where}{name} is required")
        return codec.floats(f"{self._where}{name}", value)

    def bools(self, name: str) -> Bools | None:
        """A mask, if it is there."""
        value = self._tensor(name)
        return None if value is None else codec.bools(f"{self._where}{name}", value)

    def integer(self, name: str) -> int | None:
        """An integer, if it is there."""
        value = self._take(name)
        if value is None or type(value) is int:
            return value
        raise self._wrong(name, value, "an integer")

    def number(self, name: str) -> float | None:
        """A number, if it is there."""
        value = self._take(name)
        if value is None:
            return None
        if type(value) in (int, float):
            return float(value)
        raise self._wrong(name, value, "a number")

    def text(self, name: str, choices: Iterable[str] = ()) -> str | None:
        """A string, if it is there; one of `choices`, if there are any."""
        value = self._take(name)
        if value is None or (isinstance(value, str) and (not choices or value in choices)):
            return value
        raise self._wrong(name, value, f"one of {', '.join(choices)}" if choices else "a string")

    def integers(self, name: str) -> list[int] | None:
        """A list of integers, if it is there."""
        value = self._take(name)
        if value is None or (isinstance(value, list) and {int}.issuperset(map(type, value))):
            return value
        raise self._wrong(name, value, "a list of integers")

    def texts(self, name: str, choices: Iterable[str]) -> set[str] | None:
        """A list of strings out of `choices`, as a set, if it is there."""
        value = self._take(name)
        if value is None or (isinstance(value, list) and all(item in choices for item in value)):
            return None if value is None else set(value)
        raise self._wrong(name, value, f"a list of {', '.join(choices)}")

    def payloads(self, name: str) -> list[bytes | None] | None:
        """A list of JSON objects or null, as texts, if it is there."""
        value = self._take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list of objects or null")
        for at, item in enumerate(value):
            if item is not None and not isinstance(item, dict):
                raise self._wrong(f"{name}[{at}]", item, "an object or null")
        return [None if item is None else self._payload(f"{name}[{at}]", item) for at, item in enumerate(value)]

    def _payload(self, name: str, value: dict[str, Any]) -> bytes:
        try:
            return orjson.dumps(value)
        except orjson.JSONEncodeError as error:  # it reads deeper than it writes
            raise InvalidArgument(f"{self._where}{name} is nested more than {MAX_NESTING} levels deep") from error

    def inner(self, name: str) -> Fields:
        """The fields of an object that must be there; it shares the tensors."""
        value = self._take(name)
        if not isinstance(value, dict):
            raise (
                self._wrong(name, value, "an object") if value is not None else InvalidArgument(f"{name} is required")
            )
        return Fields(value, self._tensors, f"{name}.")

    def finish(self, tensors: Iterable[str] = ()) -> None:
        """Raises InvalidArgument for a field that nobody took, or a tensor not among `tensors`."""
        unknown = self._params.keys() - self._taken
        if unknown:
            known = ", ".join(sorted(self._taken))
            raise InvalidArgument(f"unknown field {self._where}{min(unknown)[:80]}; known are {known}")
        if self._tensors is not None and (extra := self._tensors.keys() - set(tensors)):
            raise InvalidArgument(f"unknown tensor {min(extra)[:80]}; known are {', '.join(tensors)}")

    def _wrong(self, name: str, value: Any, expected: str) -> InvalidArgument:
        return InvalidArgument(f"{self._where}{name} is {shorten(value)}; it must be {expected}")
