"""The version of a database's schema: read, compared with this code's, upgraded with Alembic.

Does not know what the tables are for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from storage.base import StoreUnavailable

MIGRATIONS = Path(__file__).parents[1] / "migrations"


_ONE_AT_A_TIME = threading.Lock()
"""Alembic hands what it runs to `migrations/env.py` through a global of its own."""


def check_upgradable(connection: Connection, name: str) -> None:
    """Raise StoreUnavailable for a database of a newer release, or of something else. Changes nothing."""
    version = _version(connection)
    known = _known()
    if version is None and inspect(connection).get_table_names():
        raise StoreUnavailable(f"{name} is a database, but of something else: its tables are not ours")
    if version is not None and version not in known:
        raise StoreUnavailable(f"{name} has schema version {version}, this release knows up to {known[0]}: it is newer")


def upgrade(connection: Connection, name: str) -> None:
    """Bring a new or older database to this code's version. Raises StoreUnavailable as `check_upgradable` does."""
    check_upgradable(connection, name)
    if _version(connection) == _known()[0]:
        return
    config = _config()
    config.attributes["connection"] = connection
    with _ONE_AT_A_TIME:
        command.upgrade(config, "head")


def check(connection: Connection, name: str) -> None:
    """Raise StoreUnavailable unless the database is of this code's version."""
    check_upgradable(connection, name)
    version = _version(connection)
    if version is None:
        raise StoreUnavailable(f"{name} is an empty database; start the server once to set it up")
    if version != _known()[0]:
        raise StoreUnavailable(f"{name} has schema version {version}; start the server once to upgrade it")


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


@functools.cache
def _known() -> Sequence[str]:
    """The versions this code knows, newest first. Alembic reads all files of migrations for it."""
    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()]


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
