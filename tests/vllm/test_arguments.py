"""A profile's engine arguments: what vLLM makes of them, and what it says of wrong ones. No engine is started."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from borg_serve.config import Config, load
from borg_serve.engine import arguments
from borg_serve.engine.client import divide
from borg_serve.engine.environment import device, prepare_environment
from borg_serve.engine.prepare import Preparation
from borg_serve.errors import EngineError

TEMPLATE = "{%- set x = 'é \"quoted\"' -%}\n--not-a-flag {{ messages }}\n"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "identity.md").write_text("We are Borg.")
    (tmp_path / "profile.yaml").write_text(
        json.dumps(
            {
                "model": {"path": str(tmp_path), "dtype": "bfloat16", "served_name": "borg"},
                "identity": {"prompt": "identity.md"},
                "engine": {"max_model_len": 4096, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30},
                "server": {"drain_s": 2.5, "tool_call_parser": "hermes"},
            }
        )
    )
    return load(tmp_path / "profile.yaml")


def with_engine(config: Config, **more: Any) -> Config:
    return config.model_copy(update={"engine": {**config.engine, **more}})


# -------------------------------------------------------------------------------------------------- arguments


def test_arguments_are_what_vllm_understands(config: Config) -> None:
    """Each comes out of vLLM's own parser as it went in, whatever it looks like on a command line."""
    given = arguments.build(config, "/models/x", TEMPLATE)
    parsed = vars(arguments.namespace(given))
    assert parsed["structured_outputs_config"].backend == given.pop("structured_outputs_config")["backend"]
    assert {name: parsed[name] for name in given} == given


def test_arguments_hold_what_the_identity_stands_on(config: Config) -> None:
    given = arguments.build(config, "/models/x", TEMPLATE)
    assert given["enable_prefix_caching"] is True
    assert given["chat_template"] == TEMPLATE
    assert given["served_model_name"] == ["borg"]
    assert given["enable_prompt_tokens_details"] is True
    assert given["max_model_len"] == 4096
    parsed = arguments.namespace(given)
    assert parsed.trust_remote_code is False
    assert parsed.enable_prompt_embeds is False
    assert parsed.api_key is None
    assert not parsed.enable_lora


def test_arguments_leave_no_way_to_overrule_them(config: Config) -> None:
    """Whatever the engine section says, what other sections decide stays decided."""
    overruled = with_engine(
        config, **dict.fromkeys(arguments.OURS, "mine"), chat_template="mine", tool_call_parser="mine"
    )
    plain = arguments.build(config, "/models/x", TEMPLATE)
    given = arguments.build(overruled, "/models/x", TEMPLATE)
    assert {name: value for name, value in given.items() if name in plain} == plain


@pytest.mark.parametrize(("device", "block"), [("cpu", 32), ("cuda", 16)])
def test_arguments_pick_the_smallest_block_of_the_device(
    config: Config, monkeypatch: pytest.MonkeyPatch, device: str, block: int
) -> None:
    monkeypatch.setattr(arguments, "device", lambda: device)
    assert arguments.build(config, "/x", "")["block_size"] == block
    assert arguments.build(with_engine(config, block_size="auto"), "/x", "")["block_size"] == block
    assert arguments.build(with_engine(config, block_size=128), "/x", "")["block_size"] == 128


@pytest.mark.skipif(device() != "cpu", reason="only vLLM's CPU platform adds a process")
def test_arguments_take_one_process_where_one_worker_computes(config: Config) -> None:
    def executor(**more: Any) -> str | None:
        return arguments.build(with_engine(config, **more), "/x", "").get("distributed_executor_backend")

    found = executor()
    assert found is not None
    assert issubclass(resolve_obj_by_qualname(found), Executor), "it is where vLLM has it"
    several = executor(tensor_parallel_size=2)
    assert several is not None
    assert issubclass(resolve_obj_by_qualname(several), MultiprocExecutor)
    assert executor(pipeline_parallel_size=2) is None, "vLLM takes no class of others here"
    assert executor(distributed_executor_backend="mp") == "mp"


@pytest.mark.parametrize(("device", "base"), [("cpu", CPUWorker), ("cuda", Worker)])
def test_arguments_name_subclasses_of_vllms_scheduler_and_worker(
    config: Config, monkeypatch: pytest.MonkeyPatch, device: str, base: type
) -> None:
    monkeypatch.setattr(arguments, "device", lambda: device)
    given = arguments.build(config, "/x", "")
    assert issubclass(resolve_obj_by_qualname(given["scheduler_cls"]), Scheduler)
    assert issubclass(resolve_obj_by_qualname(given["worker_cls"]), base)


def test_arguments_give_vllm_the_whole_time_to_drain(config: Config) -> None:
    assert arguments.build(config, "/x", "")["shutdown_timeout"] == 3


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enforce_eager", False, ["--no-enforce-eager"]),
        ("revision", None, []),
        ("served_model_name", ["a", "b"], ["--served-model-name", "a", "b"]),
        ("compilation_config", {"mode": 0}, ['--compilation-config={"mode": 0}']),
        ("allowed_origins", [], ["--allowed-origins=[]"]),
        ("max_model_len", 8192, ["--max-model-len=8192"]),
        ("chat_template", "--x\n", ["--chat-template=--x\n"]),
    ],
)
def test_command_line_says_each_kind_of_value_as_vllm_reads_it(name: str, value: object, words: list[str]) -> None:
    assert arguments.command_line({name: value}) == words


def test_namespace_refuses_in_vllms_words() -> None:
    with pytest.raises(EngineError, match=r"vLLM refuses the arguments: .*max-model-lenght"):
        arguments.namespace({"model": "/x", "max_model_lenght": 5})


# --------------------------------------------------------------------------------------------- the section


@pytest.mark.parametrize("name", sorted(arguments.OURS))
def test_field_that_is_decided_elsewhere_is_refused_and_still_vllms(name: str) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (problem,) = arguments.field_problems({name: 1}, "p.yaml")
    assert problem.where == f"p.yaml: engine.{name}"
    assert problem.what == "is decided elsewhere"
    parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    assert name in {action.dest for action in parser._actions}, "vLLM has dropped it: so may we"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_model_length", 5, "Did you mean `max_model_len`?"),
        ("zzzzzzzz", 5, "Use an argument of vLLM's engine, or remove it."),
        ("port", 8000, "Use an argument of vLLM's engine, or remove it."),
        ("api_key", "x", "Use an argument of vLLM's engine, or remove it."),
        ("max_num_seqs", "many", "vLLM says"),
        ("gpu_memory_utilization", "half", "vLLM says"),
        ("kv_cache_dtype", "int3", "vLLM says"),
        ("block_size", "huge", "vLLM says"),
        ("compilation_config", "{", "vLLM says"),
        (5, 5, "Use an argument of vLLM's engine, or remove it."),
    ],
)
def test_field_that_vllm_does_not_know_or_take_is_explained(name: Any, value: object, said: str) -> None:
    (problem,) = arguments.field_problems({name: value}, "p.yaml")
    assert problem.where == f"p.yaml: engine.{name}"
    assert problem.got == value
    assert said in str(problem)
    assert "\n" not in str(problem)


def test_field_problems_come_all_at_once() -> None:
    found = arguments.field_problems(
        {"max_num_seqs": "many", "model": "x", "nonsense": 1, "block_size": "auto"}, "p.yaml"
    )
    assert [problem.where for problem in found] == [
        f"p.yaml: engine.{n}" for n in ("max_num_seqs", "model", "nonsense")
    ]


def test_field_that_is_right_is_no_problem() -> None:
    good = {
        "max_model_len": 8192,
        "block_size": 16,
        "enforce_eager": False,
        "quantization": "fp8",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
        "gpu_memory_utilization": 0.92,
        "kv_cache_dtype": "auto",
    }
    assert arguments.field_problems(good, "p.yaml") == []


# --------------------------------------------------------------------------------------------------- the rest


def test_environment_keeps_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    prepare_environment()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


@pytest.mark.parametrize(
    ("cores", "workers", "lists"),
    [
        ([0, 1], 2, "0|1"),
        ([0, 2, 4, 6], 2, "0,2|4,6"),
        ([0, 1, 2], 2, "0|1,2"),
        ([3], 2, "3|3"),
    ],
)
def test_cores_are_divided_among_workers(cores: list[int], workers: int, lists: str) -> None:
    assert divide(cores, workers) == lists


def test_preparation_is_frozen_and_whole() -> None:
    assert dataclasses.fields(Preparation)
    assert Preparation.__dataclass_params__.frozen  # type: ignore[attr-defined]
