"""Databases that earlier engines wrote themselves are served by today's: same tokens, same answers."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from htm_service.records import AppendRequest, CreateRequest
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.test_attend import DIM, SIZE, vectors
from tests.engine.test_sessions import QUERY, right
from tests.names import named

DATA = Path(__file__).parent / "data"
KEPT = {
    "v0001": "e2a4a41cc03d4545c24eff28162f44342fb530305fa368b236cb30fb87944b33",
    "v0010": "b0f2fb29af45cde77fa0de7ecac61c9ce726f3cdef868abfdea21666e846c023",
}
"""By eight appends of `vectors(1, 23, 13)`, three tokens each, each by the engine of its schema. Never made again."""


@pytest.mark.parametrize("version", KEPT)
async def test_a_database_of_an_earlier_engine_is_served(version: str, make_engine: MakeEngine, tmp_path: Path) -> None:
    kept = DATA / f"{version}.sqlite3"
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == KEPT[version], "the kept file must stay as it is"
    shutil.copy(kept, tmp_path / "htm.sqlite3")
    tokens = vectors(1, 30, DIM)
    for restart in range(2):
        store = open_store(f"sqlite:///{tmp_path}/htm.sqlite3")
        engine = await make_engine(store)
        length = 23 + 3 * restart
        info = await engine.inspect(named("kept"))
        assert (info.length, info.first_position, info.labels, info.on_full) == (length, 0, {"kept": "yes"}, "reject")
        again, is_new = await engine.create(named("kept"), CreateRequest(dim=DIM, chunk_size=SIZE, max_tokens=100))
        assert not is_new and again.id == "kept"
        assert right(tokens[:length], await engine.attend(named("kept"), QUERY))
        memories = await engine.read(named("kept"), 0, 23, embeddings=True, payloads=True)
        np.testing.assert_array_equal(memories.embeddings, tokens[:23])
        assert memories.payloads == [b'{"at": %d}' % position for position in range(23)]
        if not restart:
            added = AppendRequest(embeddings=tokens[23:26], idempotency_key="new")
            assert (await engine.append(named("kept"), added)).start == 23
        assert list(store.verify()) == []
        await engine.close()
        store.close()
