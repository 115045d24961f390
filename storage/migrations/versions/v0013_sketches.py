"""Sketches of chunks: searches need not read all tokens to make them again."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    sid = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "sketches",
        sa.Column("log", sid, primary_key=True, autoincrement=False),
        sa.Column("first", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("num_chunks", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("checksum", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":  # bits do not compress
        op.execute("ALTER TABLE sketches ALTER COLUMN data SET STORAGE EXTERNAL")
