"""The results of the Ballet example are those that its page shows."""

from __future__ import annotations

from pathlib import Path

from examples.ballet import report
from examples.ballet.__main__ import HTM, NUM_UPDATES, RESULTS
from examples.ballet.evaluation import SETTINGS, Score
from examples.ballet.learner import RATES

ROOT = Path(__file__).parents[2]


def test_the_results_are_those_of_the_docs(tmp_path: Path) -> None:
    results = report.load(RESULTS)
    page = (ROOT / "docs" / "reinforcement-learning.md").read_text()
    for agent, result in results.items():
        assert [(score.num_dancers, score.delay) for score in result.scores] == list(SETTINGS)
        cells = " | ".join(f"{100 * score.share:.1f} ({_percent(score)})" for score in result.scores)
        assert f"| {agent} | {cells} |" in page
        learned = f"{result.parameters:,} | {result.updates:,}"
        rates = " | ".join(f"{100 * share:.1f}" for share in result.rates.values())
        assert not rates or f"| {agent} | {learned} | {rates} |" in page
    report.save(results, tmp_path / "results.json")
    assert report.load(tmp_path / "results.json") == results
    assert report.table(results).row_count == len(results) + 1


def test_every_other_agent_learned_at_a_rate_of_its_own() -> None:
    """The others had been trained at HTM's rate and number of updates: full attention guessed, and could do better."""
    results = report.load(RESULTS)
    htm = results.pop(HTM)
    for agent, result in results.items():
        assert [float(rate) for rate in result.rates] == list(RATES)
        assert result.rates[result.rate] == max(result.rates.values())
        assert result.updates == NUM_UPDATES[agent] > htm.updates
        assert 0.6 < htm.parameters / result.parameters < 1.7


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{100 * low:.1f} to {100 * high:.1f}"
