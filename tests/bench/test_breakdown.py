"""The tables of `make bench-breakdown`: their parts are measured on the same requests, so none is negative."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import over_http, scene
from bench.breakdown import parts
from bench.breakdown.parts import Profile

pytestmark = pytest.mark.timeout(300)


def check(profile: Profile, whole: float | None = None) -> None:
    """Every part is there and none is negative; together they are the whole."""
    assert all(figure >= 0 for _, figure in profile.parts), profile
    assert profile.total > 0 and (whole is None or profile.total == pytest.approx(whole))


def test_parts_add_up_to_what_the_client_saw(tmp_path: Path) -> None:
    stage = scene.make_scene(tmp_path)
    query = torch.ones(1, scene.DIM)
    with over_http.serving(stage, "--timed") as port:
        over_http.fill(port, 1, scene.make_tokens(scene.TOP_K * scene.CHUNK_SIZE), stage, query.expand(4, scene.DIM))
        calls = over_http.appends(query.expand(over_http.CONNECTIONS, scene.DIM))
        seen = parts.watch(port, calls[0], 20)
        check(parts.of_append(seen), seen["client"])
        profile, _ = parts.under_load(stage, port, "One append", calls, quick=True)
        check(profile)
        seen = parts.watch(port, over_http.attends(1, query)[0][0], 20)
        check(parts.of_attend(seen), seen["client"])
