"""loadtests/gpu/kernels.py on a trace written by hand in the profiler's format, and the rooflines of layers.py."""

import gzip
import json
from pathlib import Path

import pytest

from borg_serve.sizing import plan
from loadtests.gpu import kernels, layers


def event(cat: str, name: str, begin: float, length: float, stream: int = 7) -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length, "tid": stream}


def mark(context: int, generation: int, begin: float) -> dict[str, object]:
    return event(
        "gpu_user_annotation",
        f"execute_context_{context}({context * 9})_generation_{generation}({generation})",
        begin,
        5,
    )


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    events = [
        mark(2, 0, 0),
        event("kernel", "nvjet_a", 1, 50),
        mark(0, 4, 100),
        event("kernel", "flash::FwdSm90", 100, 30),
        event("gpu_user_annotation", "execute_context_0(0)_generation_4(4)", 110, 30, stream=8),
        event("kernel", "flash::FwdSm90", 110, 30, stream=8),  # 20 of 30 beside the first
        event("gpu_memcpy", "Memcpy DtoH", 150, 10),
        event("cpu_op", "aten::mm", 150, 10),
        mark(0, 4, 200),
        event("kernel", "_merge_kernel", 220, 20),
        mark(0, 3, 300),
        event("kernel", "nvjet_a", 310, 5),
        mark(0, 3, 400),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "rank0.pt.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return path


def test_steps_end_where_the_next_begins(trace: Path) -> None:
    steps = kernels.read(trace)
    assert [(step.prompts, step.answers, step.length_us) for step in steps] == [
        (2, 0, 100),
        (0, 4, 100),
        (0, 4, 100),
        (0, 3, 100),
    ]


def test_kernels_beside_each_other_are_busy_once(trace: Path) -> None:
    step = kernels.read(trace)[1]
    assert step.busy_us == 40 + 10
    assert step.kernels_us == {"flash::FwdSm90": 60, "Memcpy DtoH": 10}


def test_summary_by_kind_of_step(trace: Path) -> None:
    rows = {row["steps"]: row for row in kernels.summary(kernels.read(trace))}
    assert set(rows) == {"with prompts", "decode, 4 rows", "decode, fewer"}
    full = rows["decode, 4 rows"]
    assert (full["count"], full["step_us"], full["idle_us"]) == (2, 100, 65)
    assert full["parts_us"] == {"attention": 30, "merge of the passes": 10, "copies": 5}
    assert rows["with prompts"]["parts_us"] == {"matrix products": 50}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90", "attention"),
        ("nvjet_sm90_tst_128x256", "matrix products"),
        ("triton_red_fused_add_rms", "fused by torch.compile"),
        ("void vllm::reshape_and_cache_flash_kernel<", "KV writes"),
        ("argmax", "other"),
    ],
)
def test_kinds(kernel: str, expected: str) -> None:
    assert kernels.kind(kernel) == expected


def test_roofline_is_memory_for_few_rows_and_arithmetic_where_many_look_at_the_same() -> None:
    gpu = plan.GPUS["h100"]
    found = layers.rooflines(gpu, 256, 2048, 164)
    bytes_a_token = 2 * 4 * 128 * 2
    assert found["no_prefix"] == pytest.approx(256 * 164 * bytes_a_token / 3.35e12 * 1e6, abs=0.1)
    assert found["stock"] == pytest.approx(256 * (2048 + 164) * bytes_a_token / 3.35e12 * 1e6, abs=0.1)
    assert found["no_prefix"] < found["shared"] < found["no_prefix"] + 2
    assert layers.roofline_us(gpu, 1, 10**9) == pytest.approx(10**9 * 4 * 28 * 128 / 990e12 * 1e6, abs=0.1)
    assert layers.rooflines(gpu, 64, 2048, 164, parts=2)["stock"] == pytest.approx(
        layers.rooflines(gpu, 64, 2048, 164)["stock"] / 2, abs=0.1
    )
