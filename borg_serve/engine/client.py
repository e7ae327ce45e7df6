"""vLLM's engine: its start, its client, the warm-up, the probe and the heartbeat.

It knows vLLM's engine client; its arguments come from `engine.arguments`. It does not know HTTP, nor what the identity
says.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from borg_serve.api.progress import CURRENT, Progress
from borg_serve.config import Probe
from borg_serve.engine.arguments import in_a_line, workers
from borg_serve.engine.environment import device
from borg_serve.engine.grammar import hold
from borg_serve.engine.guard import Guard, GuardedCore
from borg_serve.engine.renderer import register, share
from borg_serve.errors import EngineError
from borg_serve.identity.prefix import TokenPrefix
from borg_serve.metrics import HEARTBEAT_TOKENS
from borg_serve.upstream import pinned, require

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["client_class", "configure", "divide", "heartbeat", "prepare_cpu", "probe", "start", "step_logger", "warm"]


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
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    one = SamplingParams(max_tokens=1, temperature=0.0)
    # The first request that must be JSON makes the engine stand still for seconds, while it reads the tokenizer.
    grammar = StructuredOutputsParams(json_object=True)
    await generate(client, prompt, SamplingParams(max_tokens=1, structured_outputs=grammar))
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


def client_class(prefix: TokenPrefix) -> "type[AsyncLLM]":
    """vLLM's engine client for prompts that begin with the identity: guarded, and with a renderer that knows them.

    Raises EngineError if vLLM moved what the guard overrides; the class does if vLLM chose another renderer.
    """
    with pinned("engine"):
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine.async_llm import AsyncLLM

    guard = Guard(prefix.token_ids)
    require("guard", AsyncLLM, "_add_request", "add_request")
    register()

    class IdentityClient(AsyncLLM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            try:
                self.engine_core = cast(Any, GuardedCore(self.engine_core, guard))
                share(prefix, self.renderer)
            except EngineError:
                self.shutdown()
                raise

        async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            field = hold(params) if isinstance(params, SamplingParams) else None
            try:
                return await super().add_request(request_id, prompt, params, *args, **kwargs)
            except VLLMValidationError as error:
                if "grammar" in str(error).lower():
                    error.parameter = error.parameter or field
                raise

        async def _add_request(self, request: "EngineCoreRequest", *args: Any) -> None:
            guard.check(request)  # before vLLM registers the request: a refusal leaves nothing behind
            await super()._add_request(request, *args)
            if (progress := CURRENT.get()) is not None:
                block = self.vllm_config.cache_config.block_size
                progress.prompt_tokens = len(request.prompt_token_ids or ())
                progress.cached_tokens = len(prefix.token_ids) // block * block
                progress.look = _look(progress.look, self.output_processor.request_states.get(request.request_id))

    return IdentityClient


def _look(others: Callable[[Progress], None], state: Any) -> Callable[[Progress], None]:
    """Read one more sequence's progress from what vLLM keeps of it, which counts on when its client has left."""

    def look(progress: Progress) -> None:
        progress.output_tokens = 0
        others(progress)
        if state is None or state.stats is None or state.is_prefilling:
            return
        progress.output_tokens += state.stats.num_generation_tokens
        progress.cached_tokens = state.num_cached_tokens
        progress.first_token_at = state.stats.first_token_ts

    return look


def configure(args: Namespace, count: int, index: int) -> "VllmConfig":
    """vLLM's configuration of an engine, for one of its `count` API processes; `index` is -1 for their parent.

    Raises EngineError with vLLM's reason.
    """
    with pinned("engine"):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext

    prepare_cpu(vars(args))
    engine_args = AsyncEngineArgs.from_cli_args(args)
    engine_args._api_process_count, engine_args._api_process_rank = count, index
    try:
        return cast("VllmConfig", engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER))
    except (RuntimeError, ValueError, TypeError, LookupError, OSError) as error:
        cure = "Correct the profile; `borg-serve check` names the key."
        raise EngineError(f"engine: it did not start, got {in_a_line(error)}. {cure}") from error


def start(
    args: Namespace, prefix: TokenPrefix, client_config: Mapping[str, Any] | None, step: Callable[[], None]
) -> "AsyncLLM":
    """Start an engine, or join the one that `client_config` names; `step()` is called at each of its steps.

    Blocks until the weights are loaded; runs in any thread. Raises EngineError with vLLM's reason.
    """
    addresses = dict(client_config or {})
    count, index = addresses.pop("client_count", 1), addresses.pop("client_index", 0)
    try:
        return client_class(prefix).from_vllm_config(
            configure(args, count, index),
            stat_loggers=[step_logger(step)],
            disable_log_stats=args.disable_log_stats,
            client_addresses=addresses,
            client_count=count,
            client_index=index,
        )
    except (RuntimeError, ValueError, TimeoutError) as error:
        cure = "Its own log above says more; `borg-serve check` shows the arguments and the memory they need."
        raise EngineError(f"engine: it did not start, got {in_a_line(error)}. {cure}") from error
