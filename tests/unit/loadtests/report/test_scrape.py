"""The server's metrics beside a run, and whether they agree with what the clients counted."""

import pytest

from loadtests.generator.records import Outcome
from loadtests.report.scrape import agreement, values
from tests.loads import record

METRICS = """# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{engine="0"} 1000.0
vllm:prompt_tokens_total{engine="1"} 500.0
vllm:prompt_tokens_created{engine="0"} 1.7e+09
vllm:generation_tokens_total 70.0
borg_heartbeat_tokens_total{kind="prompt"} 20.0
borg_heartbeat_tokens_total{kind="output"} 1.0
borg_heartbeat_tokens_created{kind="prompt"} 1.7e+09
borg_heartbeat_tokens_created{kind="output"} 1.7e+09
other 5
"""


def test_metrics_are_summed_over_engines() -> None:
    found = values(METRICS)
    assert found["vllm:prompt_tokens_total"] == 1500.0
    assert "other" not in found


@pytest.mark.parametrize(
    ("prompt", "said"), [(100.0, "agree within 1%"), (100.9, "agree within 1%"), (150.0, "DIFFER"), (60.0, "DIFFER")]
)
def test_agreement_holds_token_totals_against_the_clients(prompt: float, said: str) -> None:
    first = {"vllm:prompt_tokens_total": 0.0, "vllm:generation_tokens_total": 0.0}
    last = {"vllm:prompt_tokens_total": prompt, "vllm:generation_tokens_total": 6.0}
    found = agreement([(0.0, first), (1.0, last)], [record(0), record(1)])
    assert found["verdict"].startswith(said)


def test_agreement_leaves_out_what_the_watchdog_asked() -> None:
    zero: dict[str, float] = dict.fromkeys(values(METRICS), 0.0)
    asked = record(prompt_tokens=1480, output_tokens=69)
    assert agreement([(0.0, zero), (1.0, values(METRICS))], [asked])["verdict"].startswith("agree")
    assert agreement([(0.0, zero), (1.0, values(METRICS))], [record(prompt_tokens=1500, output_tokens=70)])[
        "verdict"
    ].startswith("DIFFER")


def test_agreement_says_when_there_is_nothing_to_compare_or_requests_failed() -> None:
    assert agreement([], [record()])["verdict"].startswith("not checked")
    samples = [(0.0, {"vllm:prompt_tokens_total": 0.0}), (1.0, {"vllm:prompt_tokens_total": 100.0})]
    failed = [record(0), record(1, outcome=Outcome.BROKEN, prompt_tokens=0)]
    assert "1 requests that did not end well" in agreement(samples, failed)["verdict"]
