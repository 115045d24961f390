"""The store in memory keeps the contract, and is the model that SQLite is compared with."""

import pytest

from storage.base import Store
from storage.resolve import open_store
from tests.storage.contract import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return open_store("memory://")
