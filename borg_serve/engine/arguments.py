"""Configuration -> vLLM's arguments, and what is wrong with a profile's `engine` section. Starts nothing.

It knows vLLM's argument parser.
"""

import json
import math
import re
from argparse import Namespace
from collections.abc import Mapping
from functools import cache
from typing import Any, NoReturn

from borg_serve.config import Config
from borg_serve.engine import attention_choice, memory
from borg_serve.engine.environment import Device, device, vllm_version
from borg_serve.engine.grammar import BACKEND
from borg_serve.errors import ConfigError, EngineError, Problem

__all__ = [
    "SCHEDULER",
    "SEVERAL_PROCESSES",
    "WORKERS",
    "attention",
    "build",
    "check_parser_knows",
    "command_line",
    "field_problems",
    "in_a_line",
    "namespace",
    "typed",
    "workers",
]

SMALLEST_BLOCK: Mapping[Device, int] = {"cpu": 32, "cuda": 16}
"""Tokens in the smallest KV block each device serves at full speed (vLLM platforms/cpu.py; FlashAttention).

A request recomputes the identity's tokens that no full block covers; the smallest block leaves the fewest."""

SCHEDULER = "borg_serve.vllm_plugin.scheduler.SharedPrefixScheduler"
WORKERS: Mapping[Device, str] = {
    "cpu": "borg_serve.vllm_plugin.cpu.CpuWorker",
    "cuda": "borg_serve.vllm_plugin.worker.GpuWorker",
}
"""Our subclasses of vLLM's scheduler and worker. vLLM loads them because its arguments name them."""

ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Computes in the scheduler's own process. On a CPU vLLM starts another process even for a single worker, only to set
its threads: memory and seconds of imports that one worker with all cores does not need."""
SEVERAL_PROCESSES = "borg_serve.vllm_plugin.executor.SleepingExecutor"
"""For tensor parallelism on a CPU. vLLM takes no executor class of others for pipeline parallelism."""

LONGEST = 400
"""Characters of a reason of vLLM's; some name every model that it knows."""

OURS = {
    "model": "Set model.path.",
    "revision": "Set model.revision.",
    "tokenizer": "The checkpoint's own tokenizer is used: remove it.",
    "tokenizer_mode": "The checkpoint's own tokenizer is used: remove it.",
    "tokenizer_revision": "Set model.revision.",
    "served_model_name": "Set model.served_name.",
    "dtype": "Set model.dtype.",
    "load_format": "Set model.load_format.",
    "enable_prefix_caching": "The identity is always cached: remove it.",
    "trust_remote_code": "Code from a checkpoint is never run: remove it.",
    "skip_tokenizer_init": "The guard needs the tokenizer: remove it.",
    "enable_prompt_embeds": "Prompts are checked as token ids: remove it.",
    "enable_lora": "One checkpoint with one identity is served: remove it.",
    "runner": "Only generation is served: remove it.",
    "convert": "Only generation is served: remove it.",
    "override_generation_config": "Set limits.temperature, limits.top_p and limits.default_max_tokens.",
    "shutdown_timeout": "Set server.drain_s.",
    "structured_outputs_config": "Schemas are enforced by one backend, guidance: remove it.",
    "scheduling_policy": "Set weight and priority of API keys.",
    "scheduler_cls": "borg-serve's scheduler is used: remove it.",
    "worker_cls": "borg-serve's worker is used: remove it.",
}
"""vLLM arguments that other sections of the profile decide, and what to do instead."""


def build(config: Config, model: str, chat_template: str, prefix_tokens: int | None = None) -> dict[str, Any]:
    """vLLM's server arguments for a profile, by vLLM's names. Nothing is started.

    `model` is the checkpoint's directory, `chat_template` the wrapped template's text. `prefix_tokens`: how many tokens
    every prompt begins with, None where that is not known yet; the attention is then left to vLLM. Raises EngineError
    if the attention asked for cannot be had.
    """
    _check_parser(config)
    engine = dict(config.engine)
    if prefix_tokens is not None:
        engine |= attention_choice.arguments(config, attention(config, prefix_tokens), prefix_tokens)
    if config.server.keys is not None:
        engine["scheduling_policy"] = "priority"  # the gate says whose prompt goes first
        if seqs := engine.get("max_num_seqs"):
            engine["max_num_seqs"] = int(seqs) + memory.reserve(int(seqs))  # for keys that have less than their share
    if engine.get("block_size", "auto") == "auto":
        engine["block_size"] = SMALLEST_BLOCK[device()]
    if device() == "cpu" and int(engine.get("pipeline_parallel_size") or 1) == 1:
        engine.setdefault("distributed_executor_backend", ONE_PROCESS if workers(engine) == 1 else SEVERAL_PROCESSES)
    return {
        **engine,
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKERS[device()],
        "model": model,
        "served_model_name": [config.model.served_name],
        "dtype": config.model.dtype,
        # By `auto` vLLM takes the files of Mistral's own format where they lie beside these, which were not checked.
        "load_format": "safetensors" if config.model.load_format == "auto" else config.model.load_format,
        "config_format": "hf",
        "tokenizer_mode": "hf",
        "enable_prefix_caching": True,
        "chat_template": chat_template,
        "chat_template_content_format": "string",
        "override_generation_config": {"temperature": config.limits.temperature, "top_p": config.limits.top_p},
        "enable_prompt_tokens_details": True,
        "structured_outputs_config": BACKEND,
        "enable_auto_tool_choice": config.server.tool_call_parser is not None,
        "tool_call_parser": config.server.tool_call_parser,
        "shutdown_timeout": math.ceil(config.server.drain_s),
        "allowed_origins": [],
        "disable_fastapi_docs": True,
    }


def _check_parser(config: Config) -> None:
    """Raise ConfigError if vLLM has no tool call parser of that name; it would say so only after the engine's start."""
    from vllm.tool_parsers import ToolParserManager

    name, known = config.server.tool_call_parser, ToolParserManager.list_registered()
    if name is not None and name not in known:
        what, cure = f"is not one of vLLM {vllm_version()}", f"Use one of {', '.join(known)}."
        raise ConfigError([Problem(f"{config.file}: server.tool_call_parser", what, name, cure)])


def check_parser_knows(config: Config, tokenizer: Any) -> None:
    """Raise ConfigError if the tool call parser needs tokens that this tokenizer lacks."""
    from vllm.parser.parser_manager import ParserManager

    name = config.server.tool_call_parser
    try:
        ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True, tokenizer=tokenizer)
    except TypeError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        what = f"does not fit the checkpoint's tokenizer ({in_a_line(cause)})"
        cure = "Use the parser of this model's family; Qwen2.5 takes hermes."
        raise ConfigError([Problem(f"{config.file}: server.tool_call_parser", what, name, cure)]) from None


def workers(engine: Mapping[str, Any]) -> int:
    """How many workers share one engine's model, by an `engine` section."""
    return math.prod(int(engine.get(f"{kind}_parallel_size") or 1) for kind in ("tensor", "pipeline"))


def attention(config: Config, prefix_tokens: int) -> attention_choice.Choice:
    """The attention that this machine's engine gets."""
    return attention_choice.choose(config, prefix_tokens, device(), _capability())


@cache
def _capability() -> int | None:
    """Major compute capability of this machine's GPU, None without one. Asked of the driver: CUDA is not started."""
    if device() == "cpu":
        return None
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability()
    return None if found is None else int(found.major)


def command_line(args: Mapping[str, Any]) -> list[str]:
    """The same arguments as `vllm serve` takes them; None is left out (vLLM's default)."""
    words: list[str] = []
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name == "allowed_origins" or isinstance(value, Mapping):
            words.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    return words


def namespace(args: Mapping[str, Any]) -> Namespace:
    """vLLM's own parsed arguments, every default filled in. Raises EngineError in vLLM's words."""
    try:
        parsed: Namespace = _parser().parse_args(command_line(args))
    except ValueError as error:
        raise EngineError(f"engine: vLLM refuses the arguments: {in_a_line(error)}. Correct the profile.") from None
    return parsed


def typed(args: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with their values as vLLM reads them: `8k` is 8000. Raises EngineError in vLLM's words."""
    parsed = vars(namespace(args))
    return {name: parsed[name] for name in args}


def field_problems(engine: Mapping[str, Any], file: str) -> list[Problem]:
    """Check the `engine` section against vLLM's real arguments without starting anything."""
    vllm_version()  # raises where there is none
    import dataclasses
    import difflib

    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    problems = []
    for name, value in engine.items():
        where = f"{file}: engine.{name}"
        if name in OURS:
            problems.append(Problem(where, "is decided elsewhere", value, OURS[name]))
        elif name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            cure = f"Did you mean `{near[0]}`?" if near else "Use an argument of vLLM's engine, or remove it."
            problems.append(Problem(where, f"unknown to vLLM {vllm_version()}", value, cure))
        elif not (name == "block_size" and value == "auto"):
            try:
                _parser().parse_args(command_line({name: value}))
            except ValueError as error:
                reason = in_a_line(error).removeprefix(f"argument --{name.replace('_', '-')}: ")
                cure = "Correct the value, or remove it for vLLM's default."
                problems.append(Problem(where, f"vLLM says: {reason}", value, cure))
    return problems


def in_a_line(error: Exception) -> str:
    """vLLM's reason without line ends, the input and the link that pydantic adds, and what Python calls its objects."""
    reason = " ".join(str(error).partition(" [type=")[0].split())
    reason = re.sub(r"^\d+ validation errors? for (\w+) (Value error, )?", "", reason)
    reason = re.sub(r"<(?:class|function) '?([\w.]+)'?(?: at 0x[0-9a-f]+)?>|dict_keys\((.*?)\)", r"\1\2", reason)
    return reason if len(reason) <= LONGEST else reason[:LONGEST] + "…"


@cache
def _parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    return make_arg_parser(Parser())  # type: ignore[no-untyped-call]
