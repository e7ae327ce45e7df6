"""What the API processes of one server decide together: keys' limits and budgets, and whose turn it is in the engine.

A server with one API process has its own; with several their parent has it (`remote.py`). It does not know HTTP.
"""

import asyncio
from contextlib import suppress
from datetime import datetime
from typing import Any

from borg_serve.api.errors import ApiError
from borg_serve.engine.memory import Slots
from borg_serve.gate.admission import Admission, Demand, Grant
from borg_serve.gate.keys import Key
from borg_serve.gate.quota import Quota
from borg_serve.gate.request import AGAIN
from borg_serve.gate.telemetry import Spent
from borg_serve.usage.ledger import Ledger, LedgerAway

__all__ = ["Coordinator"]

BUDGETS_S = 2.0
"""How often budgets are counted anew by the ledger."""


class Coordinator:
    """Used from one event loop only. Its arguments and results are plain data, which can go to another process."""

    def __init__(self, max_wait_s: float, quota: Quota | None = None, ledger: Ledger | None = None) -> None:
        self.quota = quota
        self.ledger = ledger
        self.admission: Admission | None = None
        """There once the engine has told what it holds."""
        self._max_wait_s = max_wait_s

    async def open(self, slots: Slots) -> None:
        """Admit requests into an engine that holds so much; all API processes of it say the same."""
        if self.admission is None:
            self.admission = Admission(slots, self._max_wait_s)

    async def begin(self, key: Key | None, generates: bool) -> dict[str, str]:
        """Count a request of this key; return headers that tell what its limits leave. `end` is due afterwards.

        `generates`: whether it needs the engine. Raises ApiError, and counts nothing, if the key has reached a limit or
        would wait for too long.
        """
        if self.admission is not None and generates:
            self.admission.refuse_if_late(key)
        if key is None or self.quota is None:
            return {}
        return await self.quota.begin(key)

    async def acquire(self, key: Key | None, demand: Demand) -> Grant:
        """Wait for slots in the engine. Raises Busy."""
        if self.admission is None:
            raise RuntimeError("the engine has not been opened")
        return await self.admission.acquire(key, demand)

    async def end(self, key: Key | None, grant: Grant | None, spent: Spent) -> None:
        """Give back what a request of this key was granted, and charge the key for what it has cost."""
        if grant is not None and self.admission is not None:
            self.admission.release(grant, spent)
        if key is not None and self.quota is not None:
            await self.quota.end(key, spent.prompt_tokens + spent.output_tokens)

    async def usage(self, key: str, since: str, until: str | None, by: str) -> list[dict[str, Any]]:
        """Rows of the ledger of one key, from `since` (ISO 8601, UTC) to before `until`, each hour, day or month.

        Raises ApiError where there is no ledger, or it is away.
        """
        if self.ledger is None:
            raise ApiError(404, "This server keeps no usage ledger: set usage.url.", code="no_ledger", reason="route")
        begin, end = datetime.fromisoformat(since), until and datetime.fromisoformat(until)
        try:
            return await asyncio.to_thread(self.ledger.sums, begin, end or None, (by,), key)
        except LedgerAway:
            what = "The usage ledger cannot be read now. Try again later."
            raise ApiError(503, what, "server_error", None, "ledger_away", "ledger", AGAIN) from None

    async def keep_budgets(self) -> None:
        """Follow the ledger, until cancelled."""
        budgets = self.quota.budgets if self.quota is not None else None
        while self.ledger is not None and budgets is not None:
            with suppress(LedgerAway):
                await budgets.refresh(self.ledger.sums)
            await asyncio.sleep(BUDGETS_S)
