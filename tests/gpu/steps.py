"""Random engine steps for the attention backend: paged KV, rows of every kind, and vLLM's metadata for them."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from borg_serve.engine.attention_choice import PREFIX_OPTION
from borg_serve.vllm_plugin.attention import SharedPrefixBackend

DEVICE = torch.device("cuda")
KINDS = ("shared", "copied", "short", "crossing", "prefill")
"""Decode on the shared blocks; decode on a copy of them in other blocks; a prompt shorter than the prefix; a chunk that
begins inside the prefix; a chunk of new tokens after it."""


@dataclass
class Shape:
    """Of a layer and its cache."""

    heads: int = 28
    kv_heads: int = 4
    size: int = 128
    block: int = 16
    prefix: int = 2048
    fp8: bool = False

    def config(self, model: str, max_len: int = 8192) -> VllmConfig:
        """vLLM's configuration of an engine that shares this prefix."""
        return EngineArgs(
            model=model,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=max_len,
            max_num_seqs=512,
            max_num_batched_tokens=16384,
            block_size=self.block,
            kv_cache_dtype="fp8" if self.fp8 else "auto",
            additional_config={PREFIX_OPTION: self.prefix},
        ).create_engine_config()


@dataclass
class Step:
    """One step: its queries, the cache, and what vLLM would say of it. The first row of every kind shares."""

    query: torch.Tensor
    cache: torch.Tensor
    """[blocks, KV heads, block, 2 x size], as vLLM lays it out."""
    common: CommonAttentionMetadata
    lens: list[int]

    def halves(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [blocks, block, KV heads, size]."""
        key, value = torch.split(self.cache.transpose(1, 2), size, dim=-1)
        return key, value


def step(shape: Shape, kinds: list[str], seed: int, longest: int = 4000, padded: int = 0, exact: bool = False) -> Step:
    """A step with a row of each kind, in this order; `padded` rows without tokens after them.

    `longest`: most tokens of a row's own; `exact`: every row has so many.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    block, prefix = shape.block, shape.prefix // shape.block
    queries, lens = [], []
    for kind in kinds:
        rest = longest if exact else rng.randint(1, longest)
        if kind == "short":
            new, length = 1, rng.randint(1, shape.prefix)
        elif kind == "crossing":
            new = rng.randint(2, 64)
            length = shape.prefix - rng.randint(1, new - 1) + new - 1
        elif kind == "prefill":
            new = rng.randint(2, 200)
            length = shape.prefix + new + (0 if rng.random() < 0.3 else rest)
        else:
            new, length = 1, shape.prefix + rest
        queries.append(new)
        lens.append(length)
    columns = max(-(-length // block) for length in lens) + 3
    total = prefix + sum(-(-length // block) for length in lens) + 1
    free = (torch.randperm(total - 1) + 1).tolist()  # block 0 is vLLM's null block
    shared = [free.pop() for _ in range(prefix)]
    table = torch.randint(0, total, (len(kinds) + padded, columns), dtype=torch.int32)  # stale entries behind each row
    for row, (kind, length) in enumerate(zip(kinds, lens, strict=True)):
        used = -(-length // block)
        own = [free.pop() for _ in range(used)]
        if kind in {"shared", "prefill", "crossing", "short"}:
            own[:prefix] = shared[:used]
        table[row, :used] = torch.tensor(own, dtype=torch.int32)
    table[len(kinds) :] = 0
    queries += [0] * padded
    lens += [0] * padded
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    tokens = int(starts[-1])
    dtype = torch.bfloat16
    cache = torch.randn(total, shape.kv_heads, block, 2 * shape.size, device=DEVICE, dtype=dtype)
    query = torch.randn(tokens + padded, shape.heads, shape.size, device=DEVICE, dtype=dtype)
    if shape.fp8:
        cache, query = cache.to(torch.float8_e4m3fn), query.to(torch.float8_e4m3fn)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(DEVICE),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        num_reqs=len(lens),
        num_actual_tokens=tokens + padded,
        max_query_len=max(queries),
        max_seq_len=max(lens),
        block_table_tensor=table.to(DEVICE),
        slot_mapping=torch.zeros(tokens + padded, dtype=torch.int64, device=DEVICE),
        causal=True,
    )
    return Step(query, cache, common, lens)


class Layer(torch.nn.Module):
    """The scales that an attention layer has."""

    def __init__(self) -> None:
        super().__init__()
        self._q_scale = self._k_scale = self._v_scale = torch.ones(1, device=DEVICE)


class Backend:
    """One backend's builder and implementation for a shape."""

    def __init__(self, shape: Shape, config: VllmConfig, shared: bool) -> None:
        backend: Any = SharedPrefixBackend if shared else FlashAttentionBackend
        self.shape = shape
        self.config = config
        spec = FullAttentionSpec(
            block_size=shape.block,
            num_kv_heads=shape.kv_heads,
            head_size=shape.size,
            dtype=torch.float8_e4m3fn if shape.fp8 else torch.bfloat16,
        )
        with set_current_vllm_config(config):
            self.builder = backend.get_builder_cls()(spec, ["layer"], config, DEVICE)
            self.builder.num_heads_q = shape.heads  # the builder knows the model's, not this layer's
            self.impl = backend.get_impl_cls()(
                shape.heads, shape.size, shape.size**-0.5, shape.kv_heads, None, None, "fp8" if shape.fp8 else "auto"
            )
        self.layer = Layer()

    def build(self, common: CommonAttentionMetadata) -> Any:
        """Metadata of a step, made outside any graph."""
        with set_current_vllm_config(self.config):
            return self.builder.build(0, common)

    def forward(self, given: Step, metadata: Any, output: torch.Tensor) -> torch.Tensor:
        """One layer's output, [T, heads, size], written into `output`."""
        cache = given.cache.view(torch.uint8) if self.shape.fp8 else given.cache
        self.impl.forward(self.layer, given.query, None, None, cache, metadata, output)
        return output

    def run(self, given: Step) -> torch.Tensor:
        """The output of one step, on a buffer that held no numbers."""
        output = torch.full(given.query.shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
        return self.forward(given, self.build(given.common), output)
