"""The version of a database's schema: read, compared with this code's, upgraded with Alembic.

Does not know what the tables are for.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from storage.base import StoreUnavailable

MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(connection: Connection, name: str) -> None:
    """Bring a new or older database to this code's version. Raises StoreUnavailable for a newer one."""
    config = _config()
    if _is_current(connection, config, name):
        return
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def check(connection: Connection, name: str) -> None:
    """Raise StoreUnavailable unless the database is of this code's version."""
    if not _is_current(connection, _config(), name):
        version = MigrationContext.configure(connection).get_current_revision()
        raise StoreUnavailable(f"{name} has schema version {version or 'none'}; start the server once to upgrade it")


def _is_current(connection: Connection, config: Config, name: str) -> bool:
    script = ScriptDirectory.from_config(config)
    known = [revision.revision for revision in script.walk_revisions()]
    version = MigrationContext.configure(connection).get_current_revision()
    if version is not None and version not in known:
        raise StoreUnavailable(f"{name} has schema version {version}, this release knows up to {known[0]}: it is newer")
    return version == known[0]


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
