"""Rows of tokens belong to logs. A session that has no spans has one log, of its own number, as all that are there."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    sid = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    for table in ("blocks", "summaries", "payloads"):
        op.execute(f"ALTER TABLE {table} RENAME COLUMN sid TO log")
    op.create_table(
        "spans",
        sa.Column("sid", sid, primary_key=True, autoincrement=False),
        sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("stop", sa.BigInteger),
        sa.Column("log", sid, nullable=False, index=True),
        sa.Column("chunk_size", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "leftovers",
        sa.Column("log", sid, primary_key=True, autoincrement=False),
        sa.Column("sid", sid, primary_key=True, autoincrement=False),
        sa.Column("chunk_size", sa.BigInteger),
    )
    op.execute("INSERT INTO leftovers (log, sid) SELECT sid, sid FROM deleted_sessions")
    op.drop_table("deleted_sessions")
