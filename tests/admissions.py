"""Requests to an admission, each a task of its own."""

import asyncio

from borg_serve.gate.admission import Admission, Demand, Grant
from borg_serve.gate.keys import Key
from borg_serve.gate.telemetry import Spent

ONE = Demand(1, 10, 100)
FLOOD, OTHER, BATCH = Key("flood"), Key("other"), Key("night", priority="batch")
OVER = Spent(prompt_tokens=10, output_tokens=100, engine_s=1.0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def asking(admission: Admission, key: Key | None = None, demand: Demand = ONE) -> "asyncio.Task[Grant]":
    return asyncio.create_task(admission.acquire(key, demand))


async def leaving(*tasks: "asyncio.Task[Grant]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
