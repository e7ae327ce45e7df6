"""One layer's decode attention on a GPU, stock against shared, inside CUDA graphs: microseconds by batch.

`python -m loadtests.gpu.layers MODEL --batches 32 64 256`. The backends are those that serve; only the model
around them is left out. Several layers a graph, so that no cache is warm from the layer before.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from borg_serve.engine.memory import kv_bytes_a_token
from borg_serve.sizing.plan import ATTENTION_FLOP, ATTENTION_HEADS, GPUS, MODEL, Gpu

LAYERS = 8


def roofline_us(gpu: Gpu, read: int, looked_at: int, parts: int = 1, kv_dtype: str = "auto") -> float:
    """Microseconds below which no kernel can be, by the maker's figures.

    `read`: tokens whose keys and values come from memory; `looked_at`: pairs of a token and one that it looks at.
    """
    engine = {"kv_cache_dtype": kv_dtype}
    memory_s = read * kv_bytes_a_token(engine, replace(MODEL, num_layers=1), parts) / gpu.bytes_s
    flop_s = gpu.flop_s * (2 if kv_dtype == "fp8" else 1)
    arithmetic_s = looked_at * ATTENTION_FLOP / MODEL.num_layers / parts / flop_s
    return round(1e6 * max(memory_s, arithmetic_s), 1)


def rooflines(gpu: Gpu, batch: int, prefix: int, own: int, parts: int = 1, kv_dtype: str = "auto") -> dict[str, float]:
    """Of each case: every row reads the prefix for itself, all read it once, there is none."""
    cases = {"stock": batch * (prefix + own), "shared": prefix + batch * own, "no_prefix": batch * own}
    looked_at = {name: batch * (own if name == "no_prefix" else prefix + own) for name in cases}
    return {name: roofline_us(gpu, read, looked_at[name], parts, kv_dtype) for name, read in cases.items()}


def microseconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a captured graph."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(median(times))


def main() -> None:
    """A line of JSON each batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a directory with config.json and tokenizer")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--own", type=int, default=164, help="tokens of each row's own")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="GPUs that share the layer's heads; one is timed"
    )
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="whose roofline to show beside it")
    parser.add_argument("--fp8", action="store_true", help="FP8 queries and KV cache")
    parser.add_argument("--random", action="store_true", help="rows have 1 to --own tokens of their own")
    parser.add_argument("--splits", type=int, help="parts that the second pass may cut a row into")
    arguments = parser.parse_args()
    import torch

    from borg_serve.vllm_plugin import attention
    from tests.gpu.steps import Backend, Shape, Step, step

    attention.MIN_READS = 1
    attention.OWN_SPLITS = arguments.splits or attention.OWN_SPLITS
    parts = arguments.tensor_parallel
    shape = Shape(
        ATTENTION_HEADS // parts,
        MODEL.num_kv_heads // parts,
        prefix=arguments.prefix,
        block=arguments.block,
        fp8=arguments.fp8,
    )
    config = shape.config(arguments.model)
    backends = {"stock": Backend(shape, config, False), "shared": Backend(shape, config, True)}

    def timed(each: Backend, given: Step, flash: bool = False) -> float:
        """Microseconds a layer. `flash`: both passes are FlashAttention's."""
        layers = [given] + [Step(given.query, given.cache.clone(), given.common, given.lens) for _ in range(LAYERS - 1)]
        output = torch.empty(given.query.shape, dtype=torch.bfloat16, device="cuda")
        metadata = each.build(given.common)
        if flash:
            metadata.prefix.one_each = False
        return round(microseconds(lambda: [each.forward(layer, metadata, output) for layer in layers]) / LAYERS, 1)

    for batch in arguments.batches:
        given = step(shape, ["shared"] * batch, batch, arguments.own, exact=not arguments.random)
        bare = step(replace(shape, prefix=0), ["shared"] * batch, batch, arguments.own, exact=not arguments.random)
        row = {"batch": batch, "kv_heads": shape.kv_heads, "block": shape.block, "fp8": shape.fp8, "own": arguments.own}
        row["splits"] = attention.OWN_SPLITS
        row |= {f"{name}_us": timed(each, given) for name, each in backends.items()}
        row["shared_flash_us"] = timed(backends["shared"], given, flash=True)
        row["no_prefix_us"] = timed(backends["stock"], bare)
        kv_dtype = "fp8" if arguments.fp8 else "auto"
        row["roofline_us"] = rooflines(GPUS[arguments.gpu], batch, shape.prefix, arguments.own, parts, kv_dtype)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
