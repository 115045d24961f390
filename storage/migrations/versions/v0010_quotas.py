"""What namespaces may hold."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "quotas",
        sa.Column("namespace", sa.String().with_variant(sa.String(collation="C"), "postgresql"), primary_key=True),
        sa.Column("max_sessions", sa.BigInteger),
        sa.Column("max_tokens", sa.BigInteger),
        sa.Column("max_bytes", sa.BigInteger),
    )
