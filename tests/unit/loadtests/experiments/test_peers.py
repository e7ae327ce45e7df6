"""What the peer is started with, and how the figures of both become a report. No server is started."""

import random
from pathlib import Path
from typing import Any

import pytest

from borg_serve import config
from loadtests.experiments import peers
from loadtests.gpu.throughput import Load

ROOT = Path(__file__).parents[4]


def block(tokens: float) -> dict[str, Any]:
    figures = {"output_tokens_per_s": tokens, "ttft_p50_ms": 30.0, "ttft_p99_ms": 60.0}
    return {"requests": 9, "failed": 1, **figures}


def test_peers_get_our_profiles_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = config.load(ROOT / "configs/7b-h100-fp8.yaml", ["model.path=/model", "model.load_format=dummy"])
    words = peers.peer_words(profile, "borg", 8000, 0.46, ["--block-size=16"])
    assert words[1:6] == ["-m", "vllm.entrypoints.cli.main", "serve", "/model", "--served-model-name=borg"]
    assert {"--max-num-seqs=512", "--quantization=fp8", "--prefill-schedule-interval=4", "--block-size=16"} < set(words)
    assert not [word for word in words if "cudagraph" in word]
    monkeypatch.setenv("PYTHONPATH", "/ours")
    found = peers.peer_environment(Path("/theirs"), rust=True)
    assert found == {"PYTHONPATH": "/theirs:/ours", "VLLM_USE_RUST_FRONTEND": "1"}


def test_peers_loads_are_read() -> None:
    assert peers.load("256:0.5:6") == Load(256, 0.5, 6)
    assert peers.load("1:0:3:900") == Load(1, 0.0, 3, words=900)
    assert len({peers._title(peers.load(each)) for each in peers.LOADS}) == len(peers.LOADS)


def test_peers_report_is_ours_by_the_peers() -> None:
    rng = random.Random(0)
    sides = {
        name: [block(mean + rng.random()) for _ in range(5)] for name, mean in ((peers.OURS, 200), (peers.PEER, 100))
    }
    (row,) = peers.lines({"blocks": {"64 users": sides, "1 user": {peers.OURS: [block(1)], peers.PEER: []}}})
    ours, theirs, ratio = row["output_tokens_per_s"]
    assert (int(ours), int(theirs)) == (200, 100)
    assert 1.98 < float(ratio.partition(" ")[0]) < 2.02
    assert row["failed"] == ["5 of 50", "5 of 50"]
