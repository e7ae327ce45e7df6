"""A vLLM attention backend that reads the identity's KV once for all rows of a step, inside full CUDA graphs.

FlashAttention 3 runs in two passes: all tokens against the shared blocks as one sequence, then each row against its own
tokens; kernels.py merges them. It knows vLLM's FlashAttention backend and how many tokens are shared, not which.
docs/attention.md has a drawing.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch

from borg_serve.engine.attention_choice import PREFIX_OPTION
from borg_serve.errors import EngineError
from borg_serve.upstream import pinned
from borg_serve.vllm_plugin.graphs import SHORT
from borg_serve.vllm_plugin.kernels import decode, merge, split

with pinned("attention"):
    from vllm.config import VllmConfig
    from vllm.platforms.interface import DeviceCapability
    from vllm.utils.math_utils import cdiv
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
    from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.flash_attn import (
        FlashAttentionBackend,
        FlashAttentionImpl,
        FlashAttentionMetadata,
        FlashAttentionMetadataBuilder,
    )
    from vllm.v1.kv_cache_interface import AttentionSpec

__all__ = ["SharedPrefixBackend", "SharedPrefixBuilder", "SharedPrefixImpl", "prefix_tokens"]

MIN_READS = 160
"""Rows in a step, times KV heads of this GPU, from which two passes are faster than one (docs/results/h100.md,
docs/results/multi-gpu.md)."""
FA_VERSION = 3
OWN_SPLITS = 1
"""Into how many parts the second pass may cut a row. A row's own tokens are few and there are many rows: one part fills
the GPU, and needs no pass that joins the parts."""


def prefix_tokens(config: VllmConfig) -> int:
    """Tokens of the shared prefix. Raises EngineError if the server that set vLLM up did not promise one."""
    found = cast(dict[str, Any], config.additional_config or {}).get(PREFIX_OPTION)
    if not isinstance(found, int) or found < 1:
        cure = "Start it with `borg-serve serve`, or set identity.attention: stock."
        raise EngineError(f"attention: shares a prefix only behind the guard, got {PREFIX_OPTION}={found!r}. {cure}")
    return found


class SharedPrefixBackend(FlashAttentionBackend):
    """FlashAttention 3 with a shared prefix; `worker.GpuWorker` registers it as vLLM's CUSTOM backend."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["SharedPrefixImpl"]:
        return SharedPrefixImpl

    @staticmethod
    def get_builder_cls() -> type["SharedPrefixBuilder"]:
        return SharedPrefixBuilder

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability.major == 9

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)


@dataclass
class Prefix:
    """The first pass: T tokens as one sequence against the shared blocks."""

    span: torch.Tensor  # [2] int32: 0, T
    lens: torch.Tensor  # [1] int32: tokens in the shared blocks
    tokens: int  # T
    block_table: torch.Tensor  # [1, shared blocks] int32
    shared: torch.Tensor  # [T] bool: whether this pass counts for the token
    schedule: torch.Tensor | None  # FlashAttention's work list, the same for every step with T tokens
    one_each: bool  # every row has one token, behind few of its own: the second pass is kernels.decode


@dataclass
class SharedPrefixMetadata(FlashAttentionMetadata):
    """A step in two passes. The fields of vLLM's describe the second one: each row's own tokens."""

    prefix: Prefix | None = None


class SharedPrefixBuilder(FlashAttentionMetadataBuilder):
    """Splits each step's rows on the device, into buffers that CUDA graphs may read."""

    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.prefix_blocks = prefix_tokens(vllm_config) // self.block_size
        """The prefix's full blocks. Without any, every step is one pass."""
        scheduler, graph = vllm_config.scheduler_config, self.max_cudagraph_size or 0
        reqs, tokens = max(scheduler.max_num_seqs, graph), max(scheduler.max_num_batched_tokens, graph)
        columns = cdiv(vllm_config.model_config.max_model_len, self.block_size) + 1
        self._lens = torch.zeros(reqs, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(reqs, columns, dtype=torch.int32, device=device)
        self._shared = torch.zeros(tokens, dtype=torch.bool, device=device)
        self._prefix_table = torch.zeros(1, max(1, self.prefix_blocks), dtype=torch.int32, device=device)
        self._prefix_lens = torch.tensor([self.prefix_blocks * self.block_size], dtype=torch.int32, device=device)
        self._spans: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """One step's metadata. Its shape depends only on the padded numbers of rows and tokens, as graphs need it."""
        common = common_attn_metadata
        reads = common.num_reqs * self.num_heads_kv
        if not self.prefix_blocks or reads < MIN_READS or common.causal is not True:
            return super().build(0, common, fast_build)
        count, tokens = common.num_reqs, common.num_actual_tokens
        columns = min(cdiv(common.max_seq_len, self.block_size), self._block_table.shape[1])
        split(
            common.block_table_tensor[:count],
            common.seq_lens[:count],
            common.query_start_loc[: count + 1],
            self.block_size,
            self._prefix_table,
            self._block_table[:count, :columns],
            self._lens[:count],
            self._shared[:tokens],
        )
        its = replace(common, seq_lens=self._lens[:count], block_table_tensor=self._block_table[:count])
        splits, self.max_num_splits = self.max_num_splits, OWN_SPLITS
        own = super().build(0, its, fast_build)
        self.max_num_splits = splits  # a step in one pass has long rows to cut
        span, schedule = self._span(tokens)
        one_each = _one_each(common) and common.max_seq_len <= self.prefix_blocks * self.block_size + SHORT
        prefix = Prefix(span, self._prefix_lens, tokens, self._prefix_table, self._shared[:tokens], schedule, one_each)
        return SharedPrefixMetadata(**vars(own), prefix=prefix)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FlashAttentionMetadata:
        """The same for a graph; `graphs.DecodeGraphs` keeps one of rows with a token each for steps of short rows."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        if isinstance(metadata, SharedPrefixMetadata) and metadata.prefix is not None:
            metadata.prefix.one_each = _one_each(common_attn_metadata)
        return metadata

    def _span(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the first pass over so many tokens needs. A CUDA graph may have its address: then it is kept."""
        if (kept := self._spans.get(tokens)) is not None:
            return kept
        span = torch.arange(2, dtype=torch.int32, device=self.device) * tokens  # torch.tensor would wait for the GPU
        schedule = self._get_scheduler_metadata(
            aot_schedule=self.aot_schedule,
            batch_size=1,
            cu_query_lens=span,
            max_query_len=tokens,
            seqlens=self._prefix_lens,
            max_seq_len=self.prefix_blocks * self.block_size,
            causal=False,
            max_num_splits=0,
        )
        if tokens <= (self.max_cudagraph_size or 0):
            self._spans[tokens] = span, schedule
        return span, schedule


class SharedPrefixImpl(FlashAttentionImpl):
    """One layer's attention, in the passes that the step's metadata describes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unsupported = {
            "sliding window": self.sliding_window != (-1, -1),
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            f"FlashAttention {self.vllm_flash_attn_version}": self.vllm_flash_attn_version != FA_VERSION,
            "context parallelism": self.dcp_world_size > 1,
        }
        if any(unsupported.values()):
            what = ", ".join(name for name, is_so in unsupported.items() if is_so)
            raise EngineError(f"attention: cannot share a prefix, got {what}. Set identity.attention: stock.")

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shapes are those of FlashAttentionImpl.forward."""
        prefix = attn_metadata.prefix if isinstance(attn_metadata, SharedPrefixMetadata) else None
        if prefix is None or output_scale is not None or output_block_scale is not None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        tokens = attn_metadata.num_actual_tokens
        query, output, halves = query[:tokens], output[:tokens], self._halves(kv_cache)
        if prefix.one_each and not is_quantized_kv_cache(self.kv_cache_dtype) and not self.logits_soft_cap:
            first, lse = self._of_prefix(layer, query, halves, prefix)
            rows = (attn_metadata.block_table, attn_metadata.seq_lens)
            decode(output, query, halves, *rows, first, lse, prefix.shared, self.scale)
            return output
        # In a graph the passes run beside each other: one waits for memory, the other computes. Outside of one, where
        # steps are long anyway, two streams would only cost the host time.
        main = torch.cuda.current_stream()
        side = _side_stream() if torch.cuda.is_current_stream_capturing() else main
        side.wait_stream(main)
        with torch.cuda.stream(side):
            prefix_out, prefix_lse = self._of_prefix(layer, query, halves, prefix)
        _, own_lse = self._attend(
            layer,
            query,
            halves,
            attn_metadata.query_start_loc.shape[0] - 1,
            out=output,
            cu_seqlens_q=attn_metadata.query_start_loc,
            max_seqlen_q=attn_metadata.max_query_len,
            seqused_k=attn_metadata.seq_lens,
            max_seqlen_k=attn_metadata.max_seq_len,
            block_table=attn_metadata.block_table,
            causal=True,
            scheduler_metadata=attn_metadata.scheduler_metadata,
            num_splits=attn_metadata.max_num_splits,
        )
        main.wait_stream(side)
        merge(output, own_lse, prefix_out, prefix_lse, prefix.shared)
        return output

    def _of_prefix(
        self, layer: Any, query: torch.Tensor, halves: list[torch.Tensor], prefix: Prefix
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first pass."""
        return self._attend(
            layer,
            query,
            halves,
            1,
            cu_seqlens_q=prefix.span,
            max_seqlen_q=prefix.tokens,
            seqused_k=prefix.lens,
            max_seqlen_k=prefix.block_table.shape[1] * halves[0].shape[1],
            block_table=prefix.block_table,
            causal=False,
            scheduler_metadata=prefix.schedule,
        )

    def _halves(self, kv_cache: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values, each [blocks, block size, KV heads, head size]."""
        halves = torch.split(kv_cache.transpose(1, 2), self.head_size, dim=-1)
        cache = [canonicalize_singleton_dim_strides(half) for half in halves]
        return (
            [half.view(torch.float8_e4m3fn) for half in cache] if is_quantized_kv_cache(self.kv_cache_dtype) else cache
        )

    def _attend(
        self, layer: Any, query: torch.Tensor, halves: list[torch.Tensor], rows: int, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FlashAttention over so many rows: (output [T, heads, head size], log-sum-exps [heads, T])."""
        scales = (rows, self.num_kv_heads)
        result: tuple[torch.Tensor, torch.Tensor] = cast(Any, fa_utils).flash_attn_varlen_func(
            q=query,
            k=halves[0],
            v=halves[1],
            softmax_scale=self.scale,
            softcap=self.logits_soft_cap,
            return_softmax_lse=True,
            fa_version=FA_VERSION,
            q_descale=layer._q_scale.expand(scales) if self.supports_quant_query_input else None,
            k_descale=layer._k_scale.expand(scales),
            v_descale=layer._v_scale.expand(scales),
            **more,
        )
        return result


def _one_each(common: CommonAttentionMetadata) -> bool:
    return bool(common.max_query_len == 1 and common.num_reqs == common.num_actual_tokens)


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
