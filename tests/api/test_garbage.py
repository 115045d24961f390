"""Requests that fail leave nothing to the garbage collector; test_statuses.py has those that are refused at once."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.exercised import CALLS
from tests.garbage import collected


async def test_what_only_the_collector_frees_is_found() -> None:
    def refuse() -> None:
        try:
            raise ValueError
        except ValueError as error:
            kept = error
        assert kept

    async with collected() as found:
        refuse()
    assert any("refuse" in one for one in found)


ONE = {"queries": [1, 0, 0]}
LATE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("attend", "explain", "select", "search"), ONE),
    "search_all": {**ONE, "sessions": ["s"]},
}
FAILING: dict[str, dict[str, Any]] = {
    "batch_append": {"sessions": ["s", "nobody"], "embeddings": [[1, 0, 0]] * 2, "if_length": [77, None]},
    "batch_attend": {"sessions": ["s", "nobody"], "queries": [[1, 0, 0]] * 2, "model": "nothing"},
    "batch_step": {
        "sessions": ["s", "nobody"],
        "attend": {"queries": [[1, 0, 0]] * 2},
        "append": {"embeddings": [[1, 0, 0]] * 2, "if_length": [77, None]},
    },
    "batch_search": {"sessions": ["s", "nobody"], "queries": [[1, 0, 0]] * 2, "model": "nothing"},
    "batch_truncate": {"sessions": ["s", "nobody"], "length": [1, 1], "if_length": [77, None]},
}


@pytest.mark.parametrize("name", LATE)
async def test_requests_out_of_time(client: httpx.AsyncClient, name: str) -> None:
    async with collected() as found:
        status = (await CALLS[name].send(client, json={**LATE[name], "timeout_ms": 0.001})).status_code
    assert status == 504 and not found


@pytest.mark.parametrize("name", FAILING)
async def test_failed_items(client: httpx.AsyncClient, name: str) -> None:
    async with collected() as found:
        items = (await CALLS[name].send(client, json=FAILING[name])).json()["status"]
    assert min(items) >= 400 and not found
