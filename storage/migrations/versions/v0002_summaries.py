"""Summaries of chunks: keys that need not be computed again when a session is loaded."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    sid = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "summaries",
        sa.Column("sid", sid, primary_key=True, autoincrement=False),
        sa.Column("first", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("num_chunks", sa.BigInteger, nullable=False),
        sa.Column("checksum", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
