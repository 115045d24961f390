"""/metrics: the names that docs/operations.md tells, counted rightly, without labels that grow with users."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from api.app import create_app
from api.settings import Settings
from htm_service.metrics import SECONDS, Metrics
from tests.api.conftest import talk_to
from tests.api.exercised import CALLS, FailingEngine, domain_error

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """The value of each sample, by its name and the values of its labels."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(answer.text))
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


async def test_the_names_are_those_of_the_documentation(client: httpx.AsyncClient) -> None:
    await client.get("/v1/sessions/nobody")
    text = (await client.get("/metrics")).text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    labels: dict[str, set[str]] = {name: set() for name in kinds}
    for name, label in re.findall(r"^(\w+?)(?:_bucket|_sum|_count)?\{(.*)\}", text, re.MULTILINE):
        labels[name] |= set(re.findall(r"(\w+)=", label)) - {"le"}
    told = re.findall(r"^\| `(htm_\w+)(?:\{([\w,]+)\})?` \| (\w+) \|", PAGE, re.MULTILINE)
    assert {name: (kind, set(filter(None, some.split(",")))) for name, some, kind in told} == {
        name: (kinds[name], labels[name]) for name in kinds
    }


async def test_every_call_is_counted_under_its_name(keyed: httpx.AsyncClient) -> None:
    before = await scrape(keyed)
    for name, call in CALLS.items():
        if name != "delete_session":
            assert (await call.send(keyed)).status_code == call.status, name
    after = await scrape(keyed)
    for name, call in CALLS.items():
        if name == "delete_session":
            continue
        sample = ("htm_requests_total", name, str(call.status))
        assert after[sample] - before.get(sample, 0) == (2 if name == "metrics" else 1), sample
        assert after["htm_request_seconds_count", name] >= 1
        assert after["htm_request_seconds_bucket", name, str(SECONDS[-1])] >= 1


async def test_errors_are_counted_by_their_code(client: httpx.AsyncClient) -> None:
    await client.get("/v1/sessions/nobody")
    await client.post("/v1/sessions/s/attend", json={"queries": [1]})
    await client.post("/v1/sessions/s/attend", json={"queries": [1, 2]})
    await client.get("/wp-login.php")
    await client.put("/v1/info")
    found = await scrape(client)
    codes = {"session_not_found": 1, "invalid_argument": 2, "not_found": 1, "method_not_allowed": 1}
    assert {labels[1]: value for labels, value in found.items() if labels[0] == "htm_errors_total"} == codes
    assert found["htm_requests_total", "attend", "422"] == 2
    assert found["htm_requests_total", "other", "404"] == 1


async def test_work_is_counted(client: httpx.AsyncClient) -> None:
    before = await scrape(client)
    for _ in range(3):
        await client.post("/v1/sessions/s/attend", json={"queries": [[1, 0, 0]] * 2})
    await client.post("/v1/sessions/s/memories", json={"embeddings": [[1, 0, 0]] * 4})
    after = await scrape(client)
    assert after["htm_attended_queries_total",] - before["htm_attended_queries_total",] == 6
    assert after["htm_appended_tokens_total",] - before["htm_appended_tokens_total",] == 4
    assert after["htm_commit_seconds_count",] - before["htm_commit_seconds_count",] == 1
    assert after["htm_queue_seconds_count", "device"] - before["htm_queue_seconds_count", "device"] == 3
    assert after["htm_batch_items_sum", "device"] - before["htm_batch_items_sum", "device"] == 3
    assert after["htm_batch_seconds_count", "store"] - before["htm_batch_seconds_count", "store"] == 1
    assert after["htm_waiting", "device"] == after["htm_waiting", "store"] == 0
    assert after["htm_sessions", "resident"] == 1 and after["htm_sessions", "cold"] == 0
    assert after["htm_bytes", "device"] > after["htm_bytes", "device_keys"] > 0


async def test_no_label_grows_with_users(client: httpx.AsyncClient) -> None:
    before = len(await scrape(client))
    for number in range(50):
        await client.put(f"/v1/sessions/user-{number}", json={"dim": 3, "labels": {"user": f"ana-{number}"}})
        await client.get(f"/nothing/{number}")
        await client.request(f"METHOD{number}", "/v1/info")
    text = (await client.get("/metrics")).text
    assert len(await scrape(client)) < before + 2 * (len(SECONDS) + 6)
    assert "user-" not in text and "ana" not in text and "METHOD" not in text


async def test_a_server_whose_store_fails_is_measured_still() -> None:
    engine: Any = FailingEngine(domain_error("unhealthy"))
    engine.metrics = Metrics()
    async with talk_to(create_app(Settings(store_url="memory://"), engine=engine)) as client:
        assert (await client.get("/v1/sessions/s")).status_code == 503
        found = await scrape(client)
    assert found["htm_errors_total", "unhealthy"] == 1
    assert ("htm_commit_seconds_count",) in found and ("htm_appended_tokens_total",) not in found
