"""SQLite: the contract, and what is promised about its files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.base import Store
from tests.storage.contract import StoreContract


class TestSqliteStore(StoreContract):
    @pytest.fixture
    def store(self, sqlite_store: Store) -> Iterator[Store]:
        yield sqlite_store
