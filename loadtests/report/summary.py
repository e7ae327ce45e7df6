"""A run's records -> its figures, its course by the second, and whether they can be trusted: one JSON document.

It knows records, SLOs and calibrations. It starts nothing and draws nothing.
"""

import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

from loadtests.generator.closed_loop import common
from loadtests.generator.records import DEFINITIONS, Record
from loadtests.generator.workload import WORKLOADS
from loadtests.report.scrape import agreement
from loadtests.report.slo import PERCENTS, Slo, judge, percentile

LAG_P50_MS, LAG_P99_MS = 5.0, 25.0
"""What the generator may be late by."""

Samples = Sequence[tuple[float, dict[str, float]]]


def latencies(records: Sequence[Record]) -> dict[str, dict[str, float | int | None]]:
    """Percentiles, mean and count of every metric, in ms, over the requests that ended well."""
    ok = [record for record in records if record.ok]
    metrics: dict[str, list[float | None]] = {}
    for name in ("ttft", "e2e"):
        metrics[f"{name}_from_schedule"] = [record.metric_ms(name, True) for record in ok]
        metrics[name] = [record.metric_ms(name, False) for record in ok]
    metrics["tpot"] = [record.tpot_ms() for record in ok]
    metrics["itl"] = [gap / 1e3 for record in ok for gap in record.itl_us]
    metrics["lag"] = [(record.t_send_us - record.t_sched_us) / 1e3 for record in records]
    table: dict[str, dict[str, float | int | None]] = {}
    for name, drawn in metrics.items():
        known = [value for value in drawn if value is not None]
        table[name] = {"count": len(known), "mean": mean(known) if known else None}
        table[name] |= {f"p{percent}": percentile(known, percent) for percent in PERCENTS}
        table[name]["max"] = max(known, default=None)
    return table


def peak(records: Sequence[Record]) -> dict[str, float]:
    """Of the busiest process: streams open at once, and events with content in its busiest second."""
    parts: dict[tuple[int, int], list[Record]] = defaultdict(list)
    for record in records:  # phases have clocks of their own, and follow one another
        parts[record.worker, record.phase].append(record)
    streams = events = 0
    for part in parts.values():
        moments = sorted([(record.t_send_us, 1) for record in part] + [(record.t_end_us, -1) for record in part])
        streams = max(streams, *accumulate(step for _, step in moments))
        seconds = Counter(moment // 1_000_000 for record in part for moment, _ in _events(record))
        events = max(events, *seconds.values(), 0)
    return {"streams": streams, "events_per_s": events}


def _events(record: Record) -> list[tuple[int, float]]:
    """(moment, tokens) of every event with content; tokens are spread evenly, as the wire does not say."""
    if record.t_first_us is None:
        return []
    share = record.output_tokens / (len(record.itl_us) + 1)
    return [(moment, share) for moment in accumulate(record.itl_us, initial=record.t_first_us)]


def course(records: Sequence[Record], samples: Samples, begin_s: float) -> list[dict[str, float | None]]:
    """Second by second: arrivals, output tokens, streams open, and what the server showed then."""
    last = max((record.t_end_us for record in records), default=0)
    seconds = range(last // 1_000_000 + 1)
    due = Counter(record.t_sched_us // 1_000_000 for record in records)
    tokens: dict[int, float] = defaultdict(float)
    opened = [0] * (len(seconds) + 1)
    for record in records:
        for moment, share in _events(record):
            tokens[moment // 1_000_000] += share
        for second in range(max(0, record.t_send_us // 1_000_000), record.t_end_us // 1_000_000 + 1):
            opened[second] += 1
    rows: list[dict[str, float | None]] = [
        {"second": second, "arrivals": due[second], "output_tokens": tokens[second], "open": opened[second]}
        for second in seconds
    ]
    for before, (taken, now) in zip([None, *samples], samples, strict=False):
        second = int(taken - begin_s)
        if not 0 <= second < len(rows):
            continue
        rows[second]["running"] = now.get("vllm:num_requests_running")
        rows[second]["waiting"] = now.get("vllm:num_requests_waiting", 0.0) + now.get("borg_queued", 0.0)
        rows[second]["kv_usage"] = now.get("vllm:kv_cache_usage_perc")
        if before is not None:
            names = [f"vllm:prefix_cache_{name}_total" for name in ("queries", "hits")]
            asked, hit = (now.get(name, 0.0) - before[1].get(name, 0.0) for name in names)
            rows[second]["cache_hits"] = hit / asked if asked > 0 else None
    return rows


def validity(
    run: Mapping[str, Any], figures: Mapping[str, Any], calibration: Mapping[str, Any] | None
) -> tuple[list[str], list[str]]:
    """(why the run is void, what the reader should know)."""
    void, notes = [], []
    if not figures["ok"]:
        void.append(f"nothing was measured: no request ended well ({common(figures['details'])})")
    if not run["whole"]:
        void.append("the run was stopped before its last request had ended")
    if run["cpu_warning"]:
        void.append("Locust warned that a generating process had no CPU time left")
    lag = figures["latency_ms"]["lag"]
    if lag["p50"] is not None and (lag["p50"] > LAG_P50_MS or lag["p99"] > LAG_P99_MS):
        notes.append(
            f"requests were sent late: {lag['p50']:.1f} ms at p50, {lag['p99']:.1f} ms at p99 (calibrated for "
            f"{LAG_P50_MS:g} and {LAG_P99_MS:g}); latencies from schedule contain it, as a user would"
        )
    if calibration is None:
        notes.append("the generator was never calibrated here: make calibrate")
        return void, notes
    for name, limit in (("streams", "streams_per_worker"), ("events_per_s", "events_per_s_per_worker")):
        if figures["peak"][name] > calibration[limit]:
            what = "streams open at once" if name == "streams" else "events a second"
            void.append(
                f"one process had {figures['peak'][name]:.0f} {what}, and is calibrated for {calibration[limit]:.0f}: "
                "use more (PROCESSES=...)"
            )
    if calibration.get("machine") != environment()["machine"]:
        notes.append("the calibration is of another machine: make calibrate")
    return void, notes


def environment() -> dict[str, Any]:
    """What made the load, in words that carry no host name."""
    return {
        "machine": {
            "processor": platform.machine(),
            "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
            "system": platform.system(),
        },
        "python": platform.python_version(),
        "locust": version("locust"),  # importing it would patch this process,
    }


def document(
    run: Mapping[str, Any],
    records: Sequence[Record],
    slo: tuple[Path, Slo] | None,
    calibration: Mapping[str, Any] | None,
    *,
    samples: Samples = (),
    metrics_problem: str | None = None,
    versions: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that the report shows, the records included."""
    counted = [record for record in records if record.phase >= 0]
    ok = [record for record in counted if record.ok]
    begins = {phase["phase"]: phase["begin_us"] for phase in run["phases"]}
    # A search has several phases; each lasts from its start to its last request's end.
    duration_s = sum(max((r.t_end_us for r in counted if r.phase == phase), default=0) for phase in begins) / 1e6
    output = sum(record.output_tokens for record in ok)
    prompt = sum(record.prompt_tokens for record in ok)
    cached = [record.cached_tokens for record in ok]
    figures: dict[str, Any] = {
        "requests": len(counted),
        "ok": len(ok),
        "outcomes": dict(Counter(str(record.outcome) for record in counted).most_common()),
        "details": dict(Counter(f"{r.outcome}: {r.detail}" for r in counted if not r.ok).most_common(10)),
        "duration_s": duration_s,
        "requests_per_s": len(ok) / duration_s if duration_s else 0.0,
        "output_tokens_per_s": output / duration_s if duration_s else 0.0,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_part": None if None in cached or not prompt else sum(value or 0 for value in cached) / prompt,
        "latency_ms": latencies(counted),
        "peak": peak(counted),
        "generator_cpu_part": run.get("cpu_s", 0.0) / duration_s if duration_s else None,
    }
    void, notes = validity(run, figures, calibration)
    search = run.get("saturation")
    # A search goes beyond what the SLO allows on purpose: its verdict is whether it found a rate that does not.
    verdicts = judge(slo[1], counted, duration_s) if slo and not search else []
    if slo:
        figures["goodput"] = sum(map(slo[1].good, counted)) / duration_s if duration_s else 0.0
    first = min((number for number in begins if number >= 0), default=None)
    shown = [record for record in counted if record.phase == first]
    return {
        "format": "borg-serve load run 1",
        "run": dict(run),
        "workload": WORKLOADS[run["options"]["workload"]].source,
        "environment": environment(),
        "server": dict(versions or {}),
        "calibration": dict(calibration) if calibration else None,
        "figures": figures,
        "slo": {"file": str(slo[0]), "bounds": slo[1].model_dump(exclude_none=True)} if slo else None,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "met": search["meets"] is not None if search else all(v.met for v in verdicts) if verdicts else None,
        "void": void,
        "notes": notes,
        "agreement": agreement(samples, records, metrics_problem),
        "course": course(shown, samples, begins[first] / 1e6) if first is not None else [],
        "definitions": DEFINITIONS,
        "records": [asdict(record) for record in sorted(counted, key=lambda r: (r.phase, r.t_sched_us))],
    }
