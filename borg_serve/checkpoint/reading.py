"""Reads every tensor of a checkpoint once, to hash it and to look for NaN and infinity.

Knows bytes and dtypes; knows nothing of configurations or of manifests. Imports torch.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache

import torch  # noqa: TID253  (check.py imports this module only when it reads)

from borg_serve.checkpoint.files import DTYPES, TensorInfo
from borg_serve.errors import CheckpointError

__all__ = ["Progress", "Reading", "read_tensors"]

CHUNK_BYTES = 1 << 20  # fits in a core's L2 cache; a multiple of every dtype's size

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, in the caller's own thread."""


@dataclass(frozen=True)
class Reading:
    """What one pass over a tensor's bytes found."""

    leaf: bytes
    """SHA-256 of the tensor's name, dtype, shape and bytes."""
    non_finite: str | None
    """The first value that is not finite, `NaN at element 17`; None for a sound tensor."""


def read_tensors(
    tensors: Iterable[TensorInfo], progress: Progress | None = None, threads: int | None = None
) -> dict[str, Reading]:
    """Read every tensor once, hash it and look for NaN and infinity; by default with a thread for each usable core.

    Raises CheckpointError when a file cannot be read to the end of a tensor.
    """
    by_size = sorted(tensors, key=lambda tensor: tensor.num_bytes, reverse=True)
    total_bytes = sum(tensor.num_bytes for tensor in by_size)
    readings: dict[str, Reading] = {}
    done_bytes = 0
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each of our threads would otherwise start that many more
    pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))
    try:
        pending = {pool.submit(_read_tensor, tensor): tensor for tensor in by_size}
        for future in as_completed(pending):
            tensor = pending[future]
            readings[tensor.name] = future.result()
            done_bytes += tensor.num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)
    return readings


def _read_tensor(tensor: TensorInfo) -> Reading:
    name = DTYPES[tensor.dtype]
    dtype = None if name is None else getattr(torch, name)
    header = json.dumps([tensor.name, tensor.dtype, list(tensor.shape)], separators=(",", ":")).encode()
    # RFC 6962, section 2.1: a leaf starts with 0x00 and an interior node with 0x01, so neither can pass for the other.
    # The header's length in front of it keeps header and data apart.
    sha256 = hashlib.sha256(b"\x00" + len(header).to_bytes(8, "little") + header)
    buffer = bytearray(min(CHUNK_BYTES, tensor.num_bytes))
    non_finite = None
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            for offset in range(0, tensor.num_bytes, CHUNK_BYTES):
                chunk = memoryview(buffer)[: min(CHUNK_BYTES, tensor.num_bytes - offset)]
                if file.readinto(chunk) != len(chunk):
                    raise OSError("it ends inside the tensor: another process changed it")
                sha256.update(chunk)
                if non_finite is None and dtype is not None and dtype.is_floating_point:
                    values = torch.frombuffer(chunk, dtype=dtype)
                    if not _all_finite(values, buffer):
                        values = values.float() if dtype.itemsize == 1 else values
                        first = int(torch.isfinite(values).int().argmin())
                        kind = "Inf" if values[first].isinf() else "NaN"
                        non_finite = f"{kind} at element {offset // dtype.itemsize + first}"
    except OSError as error:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} cannot be read, got {error}. Check the disk and copy it again."
        ) from error
    return Reading(sha256.digest(), non_finite)


def _all_finite(values: torch.Tensor, buffer: bytearray) -> bool:
    """Whether all values, which begin `buffer`, are finite. Much faster than `torch.isfinite` of each."""
    if values.itemsize == 1:  # torch has no arithmetic on these, but a byte is a value
        return all(buffer.find(byte, 0, len(values)) < 0 for byte in _non_finite_bytes(values.dtype))
    return all(map(math.isfinite, values.aminmax()))  # both are NaN if any value is


@cache
def _non_finite_bytes(dtype: torch.dtype) -> list[int]:
    """The values of an 8-bit float type that are not finite."""
    patterns = torch.arange(256, dtype=torch.uint8)
    return patterns[~torch.isfinite(patterns.view(dtype).float())].tolist()
