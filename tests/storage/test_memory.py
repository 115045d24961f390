"""The store in memory keeps the contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.base import Store
from storage.resolve import open_store
from tests.storage.branch_contract import BranchContract
from tests.storage.contract import StoreContract, append, create


class TestMemoryStore(StoreContract, BranchContract):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        store = open_store("memory://")
        yield store
        store.close()


def test_it_promises_nothing_durable() -> None:
    store = open_store("memory://")
    assert (store.url, store.durable) == ("memory://", False)
    append(store, create(store).sid, 1)
    store.close()
    assert store.totals().num_sessions == 0
