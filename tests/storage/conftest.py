"""A SQLite store in a new directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.base import Store
from storage.resolve import DATABASE_NAME, open_store
from tests.databases import new_database


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the database is, in a directory that is not there yet."""
    return tmp_path / "data" / DATABASE_NAME


@pytest.fixture
def sqlite_store(path: Path) -> Iterator[Store]:
    store = open_store(new_database(path))
    yield store
    store.close()
