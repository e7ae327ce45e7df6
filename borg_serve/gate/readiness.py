"""Whether this server may take requests (I4), over all its API processes.

It knows phases only. `serving` sets them.
"""

from collections.abc import MutableSequence
from enum import IntEnum

from borg_serve import metrics

__all__ = ["Phase", "Readiness"]


class Phase(IntEnum):
    STARTING = 0
    READY = 1
    DRAINING = 2
    FAILED = 3


class Readiness:
    """The phase of API process `index` among `phases`, one byte each, shared by all of them.

    One that drains or fails makes the whole server drain or fail: `/ready` is 200 only while every process is ready.
    """

    def __init__(self, phases: MutableSequence[int] | None = None, index: int = 0) -> None:
        self._phases: MutableSequence[int] = bytearray(1) if phases is None else phases
        self._index = index
        self._reason = "the checkpoint and the engine are being prepared"
        metrics.READY.set(0)

    def set(self, phase: Phase, reason: str = "") -> None:
        """Enter a phase. `reason` is shown to every client, so it must hold no paths and no addresses."""
        self._phases[self._index] = phase
        self._reason = reason
        metrics.READY.set(phase == Phase.READY)

    @property
    def phase(self) -> Phase:
        """The whole server's phase: failed if one process failed, draining if one drains, ready if all are."""
        phases = [Phase(value) for value in self._phases]
        return next((phase for phase in (Phase.FAILED, Phase.DRAINING, Phase.STARTING) if phase in phases), Phase.READY)

    @property
    def reason(self) -> str:
        """Why the server is not ready, in a sentence for `/ready`; empty when it is."""
        if self.phase == Phase.READY:
            return ""
        return self._reason if self._phases[self._index] == self.phase else "another API process says so"
