"""The tables as today's code sees them; `migrations/` is what makes them, and a test holds the two together."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData()

# A BIGINT key is no rowid alias in SQLite, so the sid is an INTEGER there.
Sid = BigInteger().with_variant(Integer, "sqlite")

# By code point, whatever the database's language is.
Name = String().with_variant(String(collation="C"), "postgresql")

sessions = Table(
    "sessions",
    metadata,
    Column("sid", Sid, primary_key=True, autoincrement=True),
    Column("id", Name, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("max_tokens", BigInteger),
    Column("length", BigInteger, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("first_position", BigInteger, nullable=False, server_default="0"),
    Column("namespace", Name, nullable=False, server_default="default"),
    Column("model", Name),
    UniqueConstraint("namespace", "id", name="uq_sessions_namespace_id"),
    Index("ix_sessions_model", "model", "namespace"),
    sqlite_autoincrement=True,  # a sid is never used twice
)

blocks = Table(
    "blocks",
    metadata,
    Column("log", Sid, primary_key=True, autoincrement=False),
    Column("start", BigInteger, primary_key=True, autoincrement=False),
    Column("num_tokens", BigInteger, nullable=False),
    Column("episode", BigInteger),
    Column("checksum", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

summaries = Table(
    "summaries",
    metadata,
    Column("log", Sid, primary_key=True, autoincrement=False),
    Column("first", BigInteger, primary_key=True, autoincrement=False),
    Column("num_chunks", BigInteger, nullable=False),
    Column("checksum", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

# Of sessions that were searched; what has another version than today's is as if it were not there.
sketches = Table(
    "sketches",
    metadata,
    Column("log", Sid, primary_key=True, autoincrement=False),
    Column("first", BigInteger, primary_key=True, autoincrement=False),
    Column("num_chunks", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("checksum", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

payloads = Table(
    "payloads",
    metadata,
    Column("log", Sid, primary_key=True, autoincrement=False),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("sid", Sid, primary_key=True, autoincrement=False),
    Column("key", String, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False, index=True),
    sqlite_with_rowid=False,
)

owners = Table(
    "owners",
    metadata,
    Column("data_set", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("since", Float, nullable=False),
    Column("expires_at", Float),
    Column("lease_s", Float),
)

keys = Table(
    "keys",
    metadata,
    Column("namespace", Name, primary_key=True),
    Column("name", Name, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("role", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("requests_per_second", Float),
    Column("last_used_at", Float),
)

quotas = Table(
    "quotas",
    metadata,
    Column("namespace", Name, primary_key=True),
    Column("max_sessions", BigInteger),
    Column("max_tokens", BigInteger),
    Column("max_bytes", BigInteger),
)

# Where the tokens of a session that was forked, or truncated where others share, lie: its positions start .. stop-1 are
# in `log`, to which nobody appends for it any more; those without a stop are in the log that it appends to. A session
# without such rows appends to the log of its own number, from where its spans end.
spans = Table(
    "spans",
    metadata,
    Column("sid", Sid, primary_key=True, autoincrement=False),
    Column("start", BigInteger, primary_key=True, autoincrement=False),
    Column("stop", BigInteger),
    Column("log", Sid, nullable=False, index=True),
    Column("chunk_size", BigInteger, nullable=False),
)

# Logs of which rows may be left that nobody needs, and the session that left them.
leftovers = Table(
    "leftovers",
    metadata,
    Column("log", Sid, primary_key=True, autoincrement=False),
    Column("sid", Sid, primary_key=True, autoincrement=False),
    Column("chunk_size", BigInteger),
)

models = Table(
    "models",
    metadata,
    Column("namespace", Name, primary_key=True),
    Column("name", Name, primary_key=True),
    Column("hash", String, nullable=False),
    Column("config", JSON, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("version", BigInteger, nullable=False),
)

# Of versions that no model has: bytes that came before them, or that were not all there when a server stopped.
model_parts = Table(
    "model_parts",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("checksum", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
