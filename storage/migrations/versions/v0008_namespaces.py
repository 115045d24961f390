"""A session is named by namespace and id, unique together; those that are there are in the namespace `default`."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

UNIQUE = "uq_sessions_namespace_id"
COLUMNS = "sid, id, settings, max_tokens, length, num_bytes, created_at, updated_at, first_position"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        name = sa.String(collation="C")
        op.add_column("sessions", sa.Column("namespace", name, nullable=False, server_default="default"))
        op.drop_constraint("sessions_id_key", "sessions")
        op.create_unique_constraint(UNIQUE, "sessions", ["namespace", "id"])
    else:
        rebuild()


def rebuild() -> None:
    """SQLite can take no constraint off a table. What is damaged is copied as it is, and no sid is used again."""
    op.rename_table("sessions", "old_sessions")
    op.create_table(
        "sessions",
        sa.Column("sid", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("max_tokens", sa.BigInteger),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
        sa.Column("first_position", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("namespace", sa.String, nullable=False, server_default="default"),
        sa.UniqueConstraint("namespace", "id", name=UNIQUE),
        sqlite_autoincrement=True,
    )
    op.execute(f"INSERT INTO sessions ({COLUMNS}) SELECT {COLUMNS} FROM old_sessions")
    op.execute("DELETE FROM sqlite_sequence WHERE name = 'sessions'")
    op.execute("UPDATE sqlite_sequence SET name = 'sessions' WHERE name = 'old_sessions'")
    op.drop_table("old_sessions")
