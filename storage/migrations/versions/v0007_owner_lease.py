"""How long an owner's lease is. On PostgreSQL, what was deleted is vacuumed soon, as its place is then used again."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

SHARE = 0.01
"""Of a table's rows; PostgreSQL's own default is a fifth, so that of a large table nothing would go for long."""


def upgrade() -> None:
    op.add_column("owners", sa.Column("lease_s", sa.Float))
    if op.get_bind().dialect.name == "postgresql":
        for table in ("blocks", "summaries", "payloads", "idempotency"):
            options = f"autovacuum_vacuum_scale_factor = {SHARE}"
            if table != "idempotency":  # which is not so wide that it has a second table for long values
                options += f", toast.autovacuum_vacuum_scale_factor = {SHARE}"
            op.execute(f"ALTER TABLE {table} SET ({options})")
