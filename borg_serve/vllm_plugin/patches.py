"""What has to be changed in vLLM itself, for want of an extension point: three names, all of them here.

Only the engine's processes that borg-serve starts call these functions. docs/upstream.md gives the reason for each, and
the test that fails when vLLM moves the name.
"""

from functools import partialmethod
from inspect import signature
from typing import Any

from borg_serve.upstream import moved, pinned, require
from borg_serve.vllm_plugin.prefix_memo import Hasher, remember_hashes

with pinned("plugin"):
    from vllm.distributed.device_communicators import cpu_communicator, shm_broadcast
    from vllm.v1.engine import core

__all__ = ["SPIN_S", "remember_prefix_hashes", "sleep_while_waiting", "talk_through_gloo"]

SPIN_S = 0.005
"""How long a process polls for the next message before it sleeps. ZeroMQ drops a notification that follows another
within 3 million ticks (its max_command_delay); a process that sleeps by then would miss it for 5 s."""


def remember_prefix_hashes(prefix_tokens: int) -> None:
    """Make the next engine core of this process compute the block hashes of the prefix once, and salt none of them.

    `prefix_tokens`: how many tokens all prompts begin with, 0 if that is not known.

    The core creates its hasher after the scheduler and takes no other one.
    """
    module: Any = core
    make = getattr(module, "get_request_block_hasher", None)
    if not callable(make):
        raise moved("plugin", "vllm", "get_request_block_hasher")

    def make_remembering(block_size: int, *args: Any) -> Hasher:
        module.get_request_block_hasher = make
        return remember_hashes(make(block_size, *args), block_size, prefix_tokens)

    module.get_request_block_hasher = make_remembering


def sleep_while_waiting() -> None:
    """Make the message queues that this process creates from now on sleep until a message comes.

    They poll for a second after each message (https://github.com/vllm-project/vllm/issues/52916). On a CPU that takes a
    whole core from the workers.
    """
    condition: Any = shm_broadcast.SpinCondition
    if "busy_loop_s" not in signature(condition.__init__).parameters:
        raise moved("plugin", "vllm", "SpinCondition's busy_loop_s")
    condition.__init__ = partialmethod(condition.__init__, busy_loop_s=SPIN_S)


def talk_through_gloo() -> None:
    """Make the CPU workers of this process communicate through PyTorch's Gloo.

    On processors with AVX-512 vLLM's workers poll shared memory. That is twice as fast for one user, but they take all
    cores: on two cores the server needed 9 s to answer a request for its metrics.
    """
    communicator: Any = cpu_communicator.CpuCommunicator
    require("plugin", communicator, "_all_group_ranks_share_shm_group_name")
    communicator._all_group_ranks_share_shm_group_name = lambda self: False
