"""A GPU worker's table of token ids, with the prefix written once into a row, beside vLLM's own."""

import random
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform

if not (torch.cuda.is_available() and current_platform.is_cuda()):
    pytest.skip("needs a CUDA device and vLLM for CUDA", allow_module_level=True)

from vllm.v1.worker.gpu import states

from borg_serve.vllm_plugin.prefix_memo import remember_ids

ROWS, LENGTH = 8, 4096


def table() -> Any:
    return states.RequestState(ROWS, LENGTH, 8192, 0, 151_000, torch.device("cuda"))


def test_ids_on_a_gpu_are_vllms_own() -> None:
    plain, ours = table(), table()
    asked, written = 0, list[int]()
    write = ours.all_token_ids.stage_write

    def counted(row: int, start: int, ids: list[int]) -> None:
        written.append(len(ids))
        write(row, start, ids)

    ours.all_token_ids.stage_write = remember_ids(counted)
    rng = random.Random(0)
    prefix = [rng.randrange(151_000) for _ in range(2048)]
    for turn in range(30):
        for number in range(rng.randrange(1, ROWS)):
            ids = [*prefix[: rng.choice([0, 700, 2048, 2048])], *(rng.randrange(151_000) for _ in range(100))]
            asked += len(ids)
            for one in (plain, ours):
                one.add_request(f"{turn} {number}", len(ids), ids, 0, 8)
        for one in (plain, ours):
            one.apply_staged_writes()
        torch.cuda.synchronize()
        assert torch.equal(plain.all_token_ids.gpu.cpu(), ours.all_token_ids.gpu.cpu())
        for name in list(plain.req_id_to_index):
            for one in (plain, ours):
                one.remove_request(name)
    assert sum(written) < asked, "a row that holds the prefix gets only the rest"
