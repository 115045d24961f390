"""Every number that a call takes, at values that nobody means: refused, or harmless. A count of a billion once got a
server killed for memory; which numbers there are is read from the schema, so that none can be forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.settings import Settings
from tests.api.conftest import fill
from tests.api.exercised import CALLS, Call

EXTREMES = (-1, 10**9, 2**63 - 1, 10**30)
DOCUMENT: dict[str, Any] = create_app(Settings(store_url="memory://")).openapi()
OPERATIONS: dict[str, dict[str, Any]] = {
    operation["operationId"]: operation for item in DOCUMENT["paths"].values() for operation in item.values()
}
ENDLESS = ("events",)
"""Its one number says for how long it goes on."""
Path = tuple[str, ...]


def variants(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What a value may be, one of which it is."""
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    return [one for part in schema["anyOf"] for one in variants(part)] if "anyOf" in schema else [schema]


def numbers(schema: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, bool]]:
    """Where a body has numbers, or lists of them (True)."""
    for variant in variants(schema):
        for name, field in variant.get("properties", {}).items():
            kinds = {one.get("type") for one in variants(field)}
            if kinds & {"integer", "number"}:
                yield (*path, name), False
            if "array" in kinds:
                yield (*path, name), True
            yield from numbers(field, (*path, name))


def altered(body: Any, path: Path, value: Any) -> Any:
    """A copy of a body with another value at a path, or None where there is no such path in it."""
    changed = copy.deepcopy(body)
    at = changed
    for name in path[:-1]:
        at = at.setdefault(name, {})
        if not isinstance(at, dict):
            return None
    at[path[-1]] = value
    return changed


def cases(name: str) -> list[tuple[str, dict[str, Any]]]:
    """What is sent instead of a call's good request."""
    call, operation = CALLS[name], OPERATIONS[name]
    found: list[tuple[str, dict[str, Any]]] = []
    for parameter in operation.get("parameters", []):
        kinds = {one.get("type") for one in variants(parameter["schema"])}
        if parameter["in"] == "query" and kinds & {"integer", "number"}:
            given_in = [f"{parameter['name']}={value}" for value in EXTREMES]
            found += [(query, {"path": f"{call.path.partition('?')[0]}?{query}"}) for query in given_in]
    if call.json is not None:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        own = {**call.json, **({"sessions": ["s", "nobody"]} if name.startswith("batch_") else {})}  # one item fails
        for path, is_list in numbers(schema):
            for value in EXTREMES:
                for given in ([value], [value, value]) if is_list else (value,):
                    if (body := altered(own, path, given)) is not None:
                        found.append((f"{'.'.join(path)}: {given}", {"json": body}))
    return found


WITH_NUMBERS = [name for name in CALLS if name not in ENDLESS and cases(name)]


def test_the_numbers_are_found() -> None:
    found = {name: len(cases(name)) for name in WITH_NUMBERS}
    assert found.keys() >= {"attend", "search", "batch_search", "batch_step", "session_heat", "list_recalls", "fork"}
    assert found["batch_step"] > found["step"] > found["append"] >= 4 * 4


@pytest.mark.parametrize("name", WITH_NUMBERS)
async def test_extreme_numbers(client: httpx.AsyncClient, name: str) -> None:
    await fill(client, "no")
    call: Call = CALLS[name]
    for what, changes in cases(name):
        answer = await call.send(client, **changes)
        assert answer.status_code < 500 and len(answer.content) < 100_000, f"{what}: {answer.text[:500]}"
        if answer.status_code == 200 and name.startswith("batch_"):
            assert all(error["status"] < 500 for error in answer.json()["errors"]), what
