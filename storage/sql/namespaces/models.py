"""Models in the database: their rows, their bytes in parts, and which sessions name them.

Runs within a transaction of whoever writes. Does not know what is in a model, but for what must fit sessions.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, insert, select

from storage.base import (
    DeleteModel,
    ModelInUse,
    ModelRow,
    ModelWrite,
    NoSuchModel,
    PutModel,
    Refused,
    StoreDamaged,
    StoreError,
)
from storage.sql.namespaces.quotas import Usages
from storage.sql.snapshot import model_of
from storage.sql.tables import model_parts, models, sessions

PARTS_AT_ONCE = 2
"""Deleted by one step."""

_DELETE_PART = delete(model_parts).where(
    model_parts.c.version == bindparam("of_version"), model_parts.c.number == bindparam("of_number")
)


def apply_to_model(connection: Connection, write: ModelWrite, usages: Usages) -> ModelRow | Refused:
    """Put or delete a model; its row as it is now, or was, or why not. Raises StoreError without its bytes."""
    row = write.row if isinstance(write, PutModel) else None
    namespace, name = (
        (write.namespace, write.name) if isinstance(write, DeleteModel) else (write.row.namespace, write.row.name)
    )
    of_name = models.c.namespace == namespace, models.c.name == name
    before = connection.execute(select(models).where(*of_name)).first()
    if before is None and row is None:
        return NoSuchModel(f"there is no model {name!r}")
    if (refused := _in_use(connection, write, namespace, name)) is not None:
        return refused
    num_more = (0 if row is None else row.num_bytes) - (0 if before is None else before.num_bytes)
    if (usage := usages.of(connection, namespace)) is not None:
        if num_more > 0 and (beyond := usage.beyond(0, 0, num_more)) is not None:
            return beyond
        usage.add(0, 0, num_more)
    connection.execute(delete(models).where(*of_name))
    if row is None:
        assert before is not None
        return model_of(before)
    _check_bytes(connection, row)
    connection.execute(insert(models).values(asdict(row)))
    return row


def damage_of(connection: Connection, row: ModelRow) -> str | None:
    """What is wrong with a model's bytes, or None."""
    try:
        return "its bytes are not there" if read_parts(connection, row) is None else None
    except StoreDamaged as error:
        return str(error)


def add_part(connection: Connection, version: int, number: int, data: bytes) -> None:
    """Keep a part of a model's bytes."""
    values = {"version": version, "number": number, "checksum": zlib.crc32(data), "data": data}
    connection.execute(insert(model_parts).values(values))


def purge_parts(connection: Connection, unfinished: Collection[int]) -> bool | None:
    """Delete a few parts of no model; whether there are more, None when there were none."""
    query = select(model_parts.c.version, model_parts.c.number).where(
        model_parts.c.version.not_in(select(models.c.version)), model_parts.c.version.not_in(unfinished)
    )
    found = connection.execute(query.limit(PARTS_AT_ONCE + 1)).all()
    some = [{"of_version": part.version, "of_number": part.number} for part in found[:PARTS_AT_ONCE]]
    if not some:
        return None
    connection.execute(_DELETE_PART, some)
    return len(found) > len(some)


def read_parts(connection: Connection, row: ModelRow) -> bytes | None:
    """See `Store.read_model`."""
    columns = model_parts.c.number, model_parts.c.checksum, model_parts.c.data
    query = select(*columns).where(model_parts.c.version == row.version).order_by(model_parts.c.number)
    data = bytearray()
    with connection.execute(query, execution_options={"yield_per": PARTS_AT_ONCE}) as parts:
        for expected, (number, checksum, part) in enumerate(parts):
            if number != expected:
                raise StoreDamaged(f"part {expected} of its bytes is missing")
            if zlib.crc32(part) != checksum:
                raise StoreDamaged(f"part {number} of its bytes does not match its checksum")
            data += part
    if not data:
        return None
    if len(data) != row.num_bytes:
        raise StoreDamaged(f"it has {len(data)} bytes, {row.num_bytes} are recorded")
    return bytes(data)


def _check_bytes(connection: Connection, row: ModelRow) -> None:
    found = connection.execute(
        select(model_parts.c.number).where(model_parts.c.version == row.version).limit(1)
    ).first()
    if found is None:
        raise StoreError(f"the bytes of model {row.name!r} are not there")


def _in_use(connection: Connection, write: ModelWrite, namespace: str, name: str) -> ModelInUse | None:
    """Why sessions that name a model forbid the write, or None."""
    query: Select[Any] = select(sessions.c.settings).where(sessions.c.model == name)
    if write.everywhere:
        own = select(models.c.namespace).where(models.c.name == name, models.c.namespace != namespace)
        query = query.where(sessions.c.namespace.not_in(own))
    else:
        query = query.where(sessions.c.namespace == namespace)
    if isinstance(write, DeleteModel):
        found = connection.execute(query.limit(1)).first()
        return None if found is None else ModelInUse("sessions name it")
    if not write.must_fit:
        return None
    with connection.execute(query, execution_options={"yield_per": 500}) as rows:
        for (settings,) in rows:
            for field, value in write.must_fit.items():
                if settings and settings.get(field) != value:
                    return ModelInUse(
                        f"its {field} would be {value}, and a session that names it has {settings.get(field)}"
                    )
    return None
