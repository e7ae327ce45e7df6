"""Tenants of one engine: the identity's KV blocks are everybody's, those behind it are one key's (I8)."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import yaml

from tests.engine.process import Server, running

NAMES = ("one", "other", *(f"tenant-{number}" for number in range(8)))
SECRET = " ".join(f"My number is {number}." for number in range(4000, 4040))
BLOCK = 32


@pytest.fixture(scope="module")
def shared(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tenants")
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in NAMES}
    entries = [{"name": name, "sha256": digest, "metrics": name == "one"} for name, digest in digests.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump(entries))
    with running(folder, f"--set=model.path={checkpoint}", f"--set=server.keys={folder / 'keys.yaml'}") as server:
        yield server


def cached(server: Server, key: str, text: str) -> int:
    """How many of the prompt's tokens the answer's usage calls cached."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, headers=headers, timeout=180)
    answer.raise_for_status()
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def metric(server: Server, name: str) -> str:
    """The one sample of that name, whole."""
    text = httpx.get(f"{server.base_url}/metrics", headers={"authorization": "Bearer one"}, timeout=60).text
    (found,) = (line for line in text.splitlines() if line.startswith(name))
    return found


def test_tenants_share_the_identitys_blocks_in_vllms_own_count(shared: Server) -> None:
    """Ten keys at once hold the identity once, and some blocks of their own."""
    sizes = re.search(r'num_gpu_blocks="(\d+)"', metric(shared, "vllm:cache_config_info{"))
    version = httpx.get(f"{shared.base_url}/version", headers={"authorization": "Bearer one"}).json()
    assert sizes is not None
    identity = version["identity"]["tokens"] // BLOCK
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 200, "ignore_eos": True}
    with ExitStack() as stack:
        for name in NAMES:
            client = stack.enter_context(httpx.Client(base_url=shared.base_url, timeout=180))
            headers = {"authorization": f"Bearer {name}"}
            answer = client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}, headers=headers)
            next(stack.enter_context(answer).iter_lines())
        used = float(metric(shared, "vllm:kv_cache_usage_perc{").rpartition(" ")[2]) * int(sizes[1])
    assert identity < used <= identity + len(NAMES) * (2 + 200 / BLOCK)


def test_tenants_find_the_identity_and_their_own_text_alone(shared: Server) -> None:
    version = httpx.get(f"{shared.base_url}/version", headers={"authorization": "Bearer one"}).json()
    identity = version["identity"]["tokens"] // BLOCK * BLOCK
    assert cached(shared, "one", SECRET) == identity
    assert cached(shared, "one", SECRET) > identity + BLOCK, "a key finds its own text again"
    assert cached(shared, "other", SECRET) == identity, "a right guess of a stranger's text"
    assert cached(shared, "other", SECRET.replace("4000", "5000")) == identity, "a wrong one"
    assert [cached(shared, name, f"{name}: hello") for name in NAMES[2:]] == [identity] * len(NAMES[2:])
