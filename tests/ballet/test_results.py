"""The results of the Ballet example are those that its page shows."""

from __future__ import annotations

from pathlib import Path

from examples.ballet import report
from examples.ballet.__main__ import RESULTS
from examples.ballet.evaluation import SETTINGS, Score

ROOT = Path(__file__).parents[2]


def test_the_results_are_those_of_the_docs(tmp_path: Path) -> None:
    scores = report.load(RESULTS)
    page = (ROOT / "docs" / "reinforcement-learning.md").read_text()
    for agent, of_agent in scores.items():
        assert [(score.num_dancers, score.delay) for score in of_agent] == list(SETTINGS)
        cells = " | ".join(f"{100 * score.share:.1f} ({_percent(score)})" for score in of_agent)
        assert f"| {agent} | {cells} |" in page
    report.save(scores, tmp_path / "results.json")
    assert report.load(tmp_path / "results.json") == scores
    assert report.table(scores).row_count == len(scores) + 1


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{100 * low:.1f} to {100 * high:.1f}"
