"""What vLLM loads into each of its own processes (a general plugin): an engine that knows its prompts begin alike.

It makes the shared-prefix attention known by name, keeps the prefix's block hashes, blocks and token ids, lets prompts
share steps, keeps what was compiled for one GPU from another, leaves the processor to those who compute, and ends an
engine with the server it belongs to: vLLM's does not notice that its parent was killed, and would keep its memory, on a
GPU all of it. It does not know which prefix, and imports no metrics: those of an engine's process would count among the
servers'.
"""

import multiprocessing
import os
import sys
import threading
import time
from functools import cache, partialmethod
from inspect import signature
from itertools import count
from typing import Any

from borg_serve import hashes
from borg_serve.errors import EngineError

__all__ = [
    "compile_for_each_gpu",
    "keep_seeds",
    "register",
    "remember_blocks",
    "remember_hashes",
    "remember_ids",
    "sleep_while_waiting",
    "space_prefills",
    "talk_through_gloo",
]

LOOK_S = 1.0
SPIN_S = 0.005
"""How long a CPU engine's processes look for the next message before they sleep. ZeroMQ drops the note of a message
that follows another within 3 million ticks (its max_command_delay), and who sleeps already would miss it for 5 s."""
CORE = "vllm.v1.engine.core"
"""The module that makes the engine's block hasher; in the engine's process it is there before its plugins."""


@cache
def register() -> None:
    """Called by vLLM in every process of its own, more than once in some."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "borg_serve.attention.SharedPrefixBackend")
    if current_platform.is_cpu():
        sleep_while_waiting()
    parent = multiprocessing.parent_process()
    ray = sys.modules.get("ray")
    if parent is None and not (ray is not None and ray.is_initialized()):
        return  # a process of the caller's own; vLLM's are children, or Ray's
    if CORE in sys.modules:
        remember_hashes(sys.modules[CORE])
        space_prefills(sys.modules[CORE])
        remember_blocks()
    if current_platform.is_cuda():
        remember_ids()
        compile_for_each_gpu()
    if current_platform.is_cpu():
        keep_seeds()
        talk_through_gloo()
    if parent is not None and parent.pid is not None:
        threading.Thread(target=_end_with, args=(parent.pid,), name="end-with-parent", daemon=True).start()


def remember_hashes(core: Any) -> None:
    """Make the engine's hasher remember the prefix. Raises EngineError if vLLM moved its maker."""
    make = _found(core, "get_request_block_hasher")

    def remembering(block_size: int, *args: Any) -> hashes.Hasher:
        return hashes.remembering(make(block_size, *args), block_size)

    core.get_request_block_hasher = remembering


def space_prefills(core: Any) -> None:
    """Let one engine admit prompts in every `prefill_schedule_interval`-th step. Raises EngineError if vLLM moved that.

    vLLM does so for data parallelism alone. A step without prompts runs in full CUDA graphs, one with any outside them:
    of prompts that come one after another several share a step. Where nobody is decoding, no prompt waits.
    """
    engine = _found(core, "EngineCore")
    _found(engine, "_should_throttle_prefills")

    def should_throttle(self: Any) -> bool:
        steps = vars(self).setdefault("borg_serve_steps", count())
        return bool(next(steps) % self.vllm_config.scheduler_config.prefill_schedule_interval)

    engine._should_throttle_prefills = should_throttle


def remember_blocks() -> None:
    """Make KV caches whose blocks follow from their hashes alone remember the prefix. Raises EngineError if vLLM moved.

    Windows, a draft model's dropped last block and context parallelism make a hit depend on what comes behind it.
    """
    from vllm.v1.core import kv_cache_coordinator, single_type_kv_cache_manager

    coordinator = _found(kv_cache_coordinator, "UnitaryKVCacheCoordinator")
    manager = _found(single_type_kv_cache_manager, "FullAttentionManager")
    _found(coordinator, "find_longest_cache_hit")
    make = coordinator.__init__

    def remembering(cache: Any, *args: Any, **kwargs: Any) -> None:
        make(cache, *args, **kwargs)
        parts = cache.dcp_world_size * cache.pcp_world_size
        if type(cache.single_type_managers[0]) is manager and not cache.eagle_group_ids and parts == 1:
            cache.find_longest_cache_hit = hashes.finding(cache.find_longest_cache_hit, cache.block_size)

    coordinator.__init__ = remembering


def remember_ids() -> None:
    """Make a GPU's worker write the prefix once into a row of its table of token ids. Raises EngineError if vLLM moved.

    It makes a list of all ids of a step's new prompts and a tensor of that, while the GPU waits.
    """
    from vllm.v1.worker.gpu import states

    table = _found(states, "RequestState")
    make = table.__init__

    def remembering(state: Any, *args: Any, **kwargs: Any) -> None:
        make(state, *args, **kwargs)
        ids: Any = getattr(state, "all_token_ids", None)
        ids.stage_write = hashes.writing(_found(ids, "stage_write", "a worker's table of token ids"))

    table.__init__ = remembering


def compile_for_each_gpu() -> None:
    """Give each GPU a cache of its own for what vLLM compiles. Raises EngineError if vLLM moved its worker.

    The cache's folders name the worker's rank, the code in them names the GPU. To a worker of Ray's all GPUs of a host
    are visible: a replica on the second one would load what was compiled for the first, and end with CUDA's "invalid
    argument".
    """
    from vllm import envs
    from vllm.v1.worker import gpu_worker

    worker = _found(gpu_worker, "Worker")
    begin = _found(worker, "init_device")

    def init_device(self: Any) -> None:
        begin(self)
        os.environ["VLLM_CACHE_ROOT"] = os.path.join(envs.VLLM_CACHE_ROOT, f"cuda{self.device.index}")

    worker.init_device = init_device


def keep_seeds() -> None:
    """Let a request with a seed have a prompt of several steps on a CPU. Raises EngineError if vLLM moved its sampling.

    vLLM samples after each part of a prompt, and turns a seed's generator back by what only a GPU's has: on a CPU that
    ended the engine. Here the generator is away until the prompt is whole.
    """
    from vllm.v1.worker import cpu_model_runner

    runners = _found(cpu_model_runner, "CPUModelRunner")
    sample = _found(runners, "sample_tokens")

    def sample_tokens(runner: Any, *args: Any) -> Any:
        unfinished = runner.discard_request_mask.np
        generators = runner.input_batch.generators
        away = {row: generators.pop(row) for row in list(generators) if unfinished[row]}
        try:
            return sample(runner, *args)
        finally:
            generators.update(away)

    runners.sample_tokens = sample_tokens


def sleep_while_waiting() -> None:
    """Have vLLM's processes sleep until another one writes to them. Raises EngineError if vLLM moved how they wait.

    They spin for a second after each message: on a CPU engine that takes a whole core from the workers they wait for.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    condition: Any = shm_broadcast.SpinCondition
    make = condition.__init__
    if "busy_loop_s" not in signature(make).parameters:
        raise EngineError("plugin: vLLM moved SpinCondition's busy_loop_s, got none. Use the pinned vLLM.")
    condition.__init__ = partialmethod(make, busy_loop_s=SPIN_S)


def talk_through_gloo() -> None:
    """Have the workers of a CPU engine talk through PyTorch's Gloo. Raises EngineError if vLLM moved what decides it.

    On processors with AVX-512 vLLM has them spin on shared memory: twice as fast for one user, but all cores are the
    workers', and the server then gets no turn. A look at its metrics took 9 s on two cores.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    communicator: Any = cpu_communicator.CpuCommunicator
    _found(communicator, "_all_group_ranks_share_shm_group_name", "what chooses between shared memory and Gloo")
    communicator._all_group_ranks_share_shm_group_name = lambda self: False


def _found(owner: Any, name: str, what: str = "") -> Any:
    """A class or function of vLLM's that is changed here; `what` it is, where its name does not say it."""
    found = getattr(owner, name, None)
    if not callable(found):
        raise EngineError(f"plugin: vLLM moved {what or name}, got none. Use the pinned vLLM.")
    return found


def _end_with(parent: int) -> None:
    """End this process, without ceremony, when its parent has ended: there is nobody left to answer to."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
