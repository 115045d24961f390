"""Who may write: one row for all data. On PostgreSQL, ids by code point, and bytes uncompressed."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    owners = op.create_table(
        "owners",
        sa.Column("data_set", sa.String, primary_key=True),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
    )
    op.bulk_insert(owners, [{"data_set": "all", "owner": "", "epoch": 0, "since": 0.0, "expires_at": None}])
    if op.get_bind().dialect.name == "postgresql":
        op.execute('ALTER TABLE sessions ALTER COLUMN id TYPE VARCHAR COLLATE "C"')
        for table, column in (("blocks", "data"), ("summaries", "data"), ("payloads", "body")):
            op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STORAGE EXTERNAL")
