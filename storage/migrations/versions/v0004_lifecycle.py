"""Deleted sessions whose rows are still to be deleted; where sessions begin that trim their oldest chunks."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    sid = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table("deleted_sessions", sa.Column("sid", sid, primary_key=True, autoincrement=False))
    op.add_column("sessions", sa.Column("first_position", sa.BigInteger, nullable=False, server_default="0"))
