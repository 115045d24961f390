"""Sessions that forget and whose tokens begin far from position 0, by an import or after a long life."""

from __future__ import annotations

import numpy as np
import pytest

from htm_service.records import AttendRequest, SearchRequest
from tests.engine.conftest import MakeEngine
from tests.engine.test_transfers import stream
from tests.names import named
from tests.session_files import session_file

FAR = 2**50
QUERIES = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize("start", [0, 1])
async def test_what_is_asked_of_them_costs_what_is_there(make_engine: MakeEngine, start: int) -> None:
    """Masks of episodes, and the heat of chunks, were made from position 0 on: an imported file of a kilobyte that
    begins at 2^50 was answered 500, and one that begins at 2^34 took 17 GB.
    """
    engine = await make_engine()
    for name, first in (("near", 0), ("far", FAR)):
        tokens = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]
        file = session_file(
            tokens, [b""] * 5, (4, -1, 4, 4, 5), first_position=first, max_tokens=100, on_full="evict_oldest"
        )
        await engine.import_session(named(name), stream(file))

    def shifted(by: int, **more: object) -> AttendRequest:
        stops = tuple(by + stop for stop in (3, 4, 5))
        return AttendRequest(queries=QUERIES, start=by + start, stop=by + 5, stops=stops, top_k=2, **more)  # type: ignore[arg-type]

    for episodes in ([4], [5], [4, 5], [9]):
        near = await engine.attend(named("near"), shifted(0, episodes=episodes, tokens=True))
        far = await engine.attend(named("far"), shifted(FAR, episodes=episodes, tokens=True))
        np.testing.assert_array_equal(far.output, near.output)
        np.testing.assert_array_equal(far.chunk_weight, near.chunk_weight)
        assert near.recalled is not None and far.recalled is not None
        positions = [[token.position for token in row] for row in near.recalled]
        assert [[token.position - FAR for token in row] for row in far.recalled] == positions
        sought = SearchRequest(queries=QUERIES, start=start, episodes=episodes, num_wanted=5)
        of_near = await engine.search(named("near"), sought)
        of_far = await engine.search(
            named("far"), SearchRequest(queries=QUERIES, start=FAR + start, episodes=episodes, num_wanted=5)
        )
        np.testing.assert_array_equal(of_far.score, of_near.score)
        np.testing.assert_array_equal(np.where(of_far.position < 0, -1, of_far.position - FAR), of_near.position)
    heat = await engine.heat(named("far"), FAR // 2, None, 3)
    expected = await engine.heat(named("near"), 0, None, 3)
    np.testing.assert_array_equal(heat.num_recalls, expected.num_recalls)
    np.testing.assert_allclose(heat.mass, expected.mass)
    whole = await engine.heat(named("far"))
    assert whole.num_recalls.sum() == expected.num_recalls.sum() > 0
