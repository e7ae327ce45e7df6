"""The estimate against what was measured, and its arithmetic."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from borg_serve.config import load
from borg_serve.errors import ConfigError
from borg_serve.sizing.plan import (
    GPUS,
    IDENTITY_TOKENS,
    REPLICA_SHARE,
    Gpu,
    Plan,
    Workload,
    api_tokens_s,
    plan,
    speed,
)
from borg_serve.sizing.text import document, notes, text

H100 = GPUS["h100"]
STOCK_H100 = replace(H100, two_passes=False)
CONFIGS = Path(__file__).parents[3] / "configs"
ENGINE = load(CONFIGS / "7b-h100.yaml").engine
FP8 = load(CONFIGS / "7b-h100-fp8.yaml").engine
RESULTS = Path(__file__).parents[3] / "docs" / "results"

OFFLINE = Workload(new_tokens=100, output_tokens=128, spread=False)
PREFIX = 2048
OWN = 100 + 128 // 2
"""Tokens of its own that a request holds halfway through its answer."""


@pytest.mark.parametrize(
    ("gpu", "users", "tp", "report", "repeats", "within"),
    [
        ("h100", 64, 1, "h100", "7,343 · 7,176", 0.05),
        ("h100", 256, 1, "h100", "18,335 · 18,158", 0.05),
        ("h200", 64, 1, "h100", "9,533 · 9,694", 0.05),
        ("h200", 256, 1, "h100", "21,413 · 21,088", 0.05),
        ("h200", 1, 2, "multi-gpu", "293 · 294", 0.15),
        ("h200", 64, 2, "multi-gpu", "12,536 · 12,624", 0.15),
        ("h200", 256, 2, "multi-gpu", "23,765 · 25,022", 0.15),
    ],
)
def test_plan_gives_the_tokens_that_were_served(
    gpu: str, users: int, tp: int, report: str, repeats: str, within: float
) -> None:
    assert repeats in (RESULTS / f"{report}.md").read_text(encoding="utf-8")
    measured = mean(float(value.replace(",", "")) for value in repeats.split(" · "))
    context = IDENTITY_TOKENS + 120 + 64
    together = Workload(spread=False)
    assert speed(GPUS[gpu], users, context, ENGINE, tp, together).tokens_s == pytest.approx(measured, rel=within)


@pytest.mark.parametrize(
    ("users", "interval", "repeats"),
    [(64, 1, "5,530 · 5,763"), (256, 1, "11,420 · 12,878"), (64, 4, "6,893 · 7,465"), (256, 4, "14,766 · 17,736")],
)
def test_plan_gives_the_tokens_that_users_with_different_answers_got(users: int, interval: int, repeats: str) -> None:
    assert repeats in (RESULTS / "multi-gpu.md").read_text(encoding="utf-8")
    measured = mean(float(value.replace(",", "")) for value in repeats.split(" · "))
    engine = {**ENGINE, "prefill_schedule_interval": interval}
    found = speed(GPUS["h200"], users, IDENTITY_TOKENS + 120 + 64, engine)
    assert found.tokens_s == pytest.approx(measured, rel=0.1)


def test_plan_waits_for_no_prompt_where_nobody_else_decodes() -> None:
    assert speed(H100, 1, PREFIX + OWN, ENGINE).mixed_ms == 0
    few, many = (speed(H100, users, PREFIX + OWN, ENGINE).mixed_ms for users in (8, 256))
    assert 0 < few < many < 11


@pytest.mark.parametrize(
    ("gpu", "users", "engine", "shared", "measured", "within"),
    [
        (STOCK_H100, 64, ENGINE, True, 9_750, 0.3),
        (STOCK_H100, 256, ENGINE, True, 12_400, 0.3),
        (STOCK_H100, 256, FP8, True, 17_240, 0.3),
        (H100, 64, ENGINE, True, 10_953, 0.3),
        (H100, 256, ENGINE, True, 15_532, 0.3),
        (H100, 64, ENGINE, False, 2_110, 0.3),
        (H100, 256, ENGINE, False, 2_240, 0.3),
        (GPUS["h200"], 256, ENGINE, True, 17_221, 0.333),
        (GPUS["h200"], 256, FP8, True, 21_272, 0.3),
        (GPUS["h200"], 512, FP8, True, 25_022, 0.333),
    ],
)
def test_plan_is_within_a_third_of_the_offline_engine(
    gpu: Gpu, users: int, engine: dict[str, object], shared: bool, measured: int, within: float
) -> None:
    # One model for both: an offline engine has no HTTP beside it and takes all prompts at once.
    found = speed(gpu, users, PREFIX + OWN, engine, 1, OFFLINE, shared=shared, identity_tokens=PREFIX)
    assert found.tokens_s == pytest.approx(measured, rel=within)


def test_plan_reads_the_weights_at_the_measured_bandwidth() -> None:
    assert speed(H100, 1, 3_000, ENGINE).weights_ms == pytest.approx(4.7, abs=0.05)
    assert speed(H100, 1, 3_000, FP8).weights_ms == pytest.approx(2.35, abs=0.05)


def test_plan_reads_the_shared_identity_as_fast_as_the_kernel_did() -> None:
    # One layer's attention with a shared prefix less the same without one, 28 layers, at 256 sequences.
    stock, shared = (speed(gpu, 256, PREFIX + OWN, ENGINE, identity_tokens=PREFIX) for gpu in (STOCK_H100, H100))
    assert stock.identity_ms == pytest.approx((190.9 - 51.4) * 28 / 1000, rel=0.05)
    assert shared.identity_ms == pytest.approx((83.7 - 61.8) * 28 / 1000, rel=0.1)
    few = speed(H100, 64, PREFIX + OWN, ENGINE, identity_tokens=PREFIX)
    assert few.identity_ms == pytest.approx((35.0 - 19.1) * 28 / 1000, rel=0.15)
    assert speed(H100, 1, PREFIX + OWN, ENGINE) == speed(STOCK_H100, 1, PREFIX + OWN, ENGINE), "one row takes one pass"
    # Own tokens are read from memory: 256 sequences of 250 tokens at 3.0 TB/s.
    assert speed(H100, 256, IDENTITY_TOKENS + 250, ENGINE).own_ms == pytest.approx(256 * 250 * 57_344 / 3.0e9, rel=0.01)


def test_plan_of_few_users_is_one_replica_with_all_its_api_processes() -> None:
    found = plan("h100", 100, 8_192, ENGINE, processes=4)
    assert (found.replicas, found.tensor_parallel_size, found.api_processes) == (1, 1, 4)
    assert found.weights_bytes / (1 << 30) == pytest.approx(14.2, abs=0.05)
    assert found.kv_tokens == pytest.approx(1_000_000, rel=0.05), "what the profile says of itself"
    assert found.tokens_s == pytest.approx(100 * found.tokens_s_a_user)
    assert len(notes(found)) == 1


def test_plan_of_many_users_spreads_them_evenly_and_tells_of_conversations() -> None:
    found = plan("h100", 1_000, 8_192, ENGINE, processes=4)
    assert found.replicas == -(-1_000 // found.users_a_replica) > 1
    assert found.api_processes == 1, "Ray Serve runs one a replica"
    said = " ".join(notes(found))
    assert "x-session-id" in said
    assert "while one is replaced" in said


def test_plan_never_promises_more_than_the_api_processes_carry() -> None:
    found = plan("h100", 2_560, 2_400, ENGINE, processes=4)
    assert found.engine_tokens_s > 9_000
    assert found.tokens_s == pytest.approx(9_000 * REPLICA_SHARE * found.replicas)
    assert any("API processes" in note for note in notes(found))
    fewer_events = plan("h100", 2_560, 2_400, {**ENGINE, "stream_interval": 4}, processes=4)
    carried = api_tokens_s({"stream_interval": 4})
    assert fewer_events.tokens_s == pytest.approx(carried * REPLICA_SHARE * found.replicas)


@pytest.mark.parametrize(
    ("replicas", "users", "repeats"),
    [(1, 64, "6,770 · 6,619"), (1, 256, "10,834 · 11,223"), (2, 128, "12,735 · 13,274"), (2, 512, "20,964 · 21,852")],
)
def test_plan_gives_the_tokens_that_replicas_served(replicas: int, users: int, repeats: str) -> None:
    assert repeats in (RESULTS / "multi-gpu.md").read_text(encoding="utf-8")
    measured = mean(float(value.replace(",", "")) for value in repeats.split(" · "))
    engine = {**ENGINE, "stream_interval": 4, "prefill_schedule_interval": 4, "max_num_seqs": users // replicas}
    found = plan("h200", users * 2 // replicas, IDENTITY_TOKENS + 120 + 64, engine)
    assert found.replicas == 2, "one behind Ray Serve is planned as half of two"
    assert found.tokens_s * replicas / 2 == pytest.approx(measured, rel=0.1)


def test_plan_gives_an_api_process_what_was_measured_of_one() -> None:
    report = json.loads((RESULTS / "api-process.json").read_text())
    for interval, blocks in report["blocks"].items():
        measured = 1e6 / median(block["server_us_a_token"] for block in blocks)
        assert api_tokens_s({"stream_interval": int(interval)}) == pytest.approx(measured, rel=0.03)
    assert 8_740 <= api_tokens_s({}) <= 9_030


def test_plan_is_bound_by_the_scheduler_or_by_memory() -> None:
    short, long = plan("h100", 10, 2_400, ENGINE), plan("h100", 10, 32_768, ENGINE)
    assert short.users_a_replica == ENGINE["max_num_seqs"] == 256 < short.users_by_memory
    assert long.users_a_replica == long.users_by_memory == 1_035_488 // (32_768 - 2_128) == 33
    assert "by engine.max_num_seqs" in text(short)
    assert "by memory" in text(long)


def test_plan_takes_the_tensor_parallelism_of_the_profile() -> None:
    found = plan("h100", 10, 8_192, load(CONFIGS / "7b-tp2.yaml").engine)
    assert found.tensor_parallel_size == 2
    assert found.weights_bytes / (1 << 30) == pytest.approx(7.1, abs=0.05)
    said = " ".join(notes(found))
    assert "on two GPUs of one host" in said
    assert "for many users" in said


def test_plan_says_what_the_gpus_of_a_replica_would_make_apart() -> None:
    together = plan("h200", 64, 2_400, load(CONFIGS / "7b-tp2.yaml").engine, processes=4)
    apart = plan("h200", 64, 2_400, {**ENGINE, "max_num_seqs": 32})
    assert (apart.replicas, apart.tensor_parallel_size) == (2, 1)
    assert together.tokens_s_apart == pytest.approx(apart.tokens_s)
    assert apart.tokens_s_apart is None
    too_long = plan("l40s", 2, 32_768, {**load(CONFIGS / "7b-tp2.yaml").engine, "gpu_memory_utilization": 0.4})
    assert too_long.tokens_s_apart is None, "one GPU does not hold them"


def test_plan_takes_more_gpus_where_one_is_too_small() -> None:
    alone = plan("l40s", 10, 8_192, ENGINE)
    crowded = plan("l40s", 10, 8_192, {**ENGINE, "gpu_memory_utilization": 0.4})
    assert (alone.tensor_parallel_size, crowded.tensor_parallel_size) == (1, 2)
    assert crowded.kv_tokens > 8_192


def test_plan_says_when_nothing_fits() -> None:
    with pytest.raises(ConfigError, match=r"fits on no replica of up to 4 L40S.*Use a larger GPU"):
        plan("l40s", 10, 8_192, {**ENGINE, "gpu_memory_utilization": 0.1})


def test_plan_names_every_mistake_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("h100", 0, 40_000, ENGINE)
    assert [problem.where for problem in caught.value.problems] == ["--users", "--context"]
    with pytest.raises(ConfigError, match="--context"):
        plan("h100", 1, IDENTITY_TOKENS, ENGINE)
    with pytest.raises(ConfigError, match="h100, h200, a100-80gb, l40s"):
        plan("b200", 1, 8_192, ENGINE)


def test_plan_ranks_gpus_by_what_limits_them() -> None:
    found = {name: plan(name, 60, 8_192, ENGINE).tokens_s for name in GPUS}
    assert found["h200"] > found["h100"] > found["a100-80gb"] > found["l40s"]


@given(
    st.sampled_from(sorted(GPUS)), st.integers(1, 20_000), st.integers(IDENTITY_TOKENS + 1, 32_768), st.integers(1, 8)
)
def test_plan_has_a_slot_for_every_user(gpu: str, users: int, context: int, processes: int) -> None:
    found = plan(gpu, users, context, ENGINE, processes)
    assert (found.replicas - 1) * found.users_a_replica < users <= found.replicas * found.users_a_replica
    assert found.users_a_replica * (context - IDENTITY_TOKENS) <= found.kv_tokens
    assert 0 < found.tokens_s_unshared < found.tokens_s or found.tokens_s == pytest.approx(found.tokens_s_unshared)
    assert found.speed.tokens_s == found.engine_tokens_s


@given(st.integers(1, 255), st.integers(IDENTITY_TOKENS + 1, 32_000))
def test_plan_s_speed_grows_with_users_and_falls_with_their_contexts(users: int, context: int) -> None:
    here = speed(H100, users, context, ENGINE).tokens_s
    assert speed(H100, users + 1, context, ENGINE).tokens_s > here
    assert speed(H100, users, context + 500, ENGINE).tokens_s < here


@pytest.fixture
def two_replicas() -> Plan:
    return plan("h100", 400, 4_096, ENGINE, 4)


def test_plan_s_json_is_complete_and_says_that_it_is_an_estimate(two_replicas: Plan) -> None:
    found = json.loads(json.dumps(document(two_replicas)))
    assert found["estimate"] is True
    assert found["replicas"] == 2
    assert found["notes"] == notes(two_replicas)
    assert found["speed"]["weights_ms"] == 4.7


def test_plan_s_text_claims_two_digits_at_most(two_replicas: Plan) -> None:
    lines = text(two_replicas).splitlines()
    assert lines[0].startswith("estimate for 400 users")
    (speeds,) = [line for line in lines if line.startswith("  output tokens/s")]
    digits = speeds.partition("about ")[2].partition(" ")[0].replace(",", "")
    assert len(digits.rstrip("0")) <= 2
    assert "An estimate, not a measurement" in text(two_replicas)
