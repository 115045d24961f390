"""Models, and which one each session names."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

OF_SETTINGS = {
    "sqlite": "CASE WHEN json_valid(settings) THEN json_extract(settings, '$.model') END",  # some may be damaged
    "postgresql": "settings ->> 'model'",
}


def upgrade() -> None:
    name = sa.String().with_variant(sa.String(collation="C"), "postgresql")
    op.create_table(
        "models",
        sa.Column("namespace", name, primary_key=True),
        sa.Column("name", name, primary_key=True),
        sa.Column("hash", sa.String, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    parts = op.create_table(
        "model_parts",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("checksum", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    dialect = op.get_bind().dialect.name
    if dialect == "postgresql":  # numbers do not compress
        op.execute(f"ALTER TABLE {parts.name} ALTER COLUMN data SET STORAGE EXTERNAL")
    op.add_column("sessions", sa.Column("model", name))
    op.execute(f"UPDATE sessions SET model = {OF_SETTINGS[dialect]}")
    op.create_index("ix_sessions_model", "sessions", ["model", "namespace"])
