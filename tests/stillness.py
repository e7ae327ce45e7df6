"""Whether the machine stood still: a paused machine's clocks go on, and every deadline of a test passes at once."""

import threading
from time import monotonic, sleep  # its own: a test may turn the module's clock

STEP_S = 0.25
STILL_S = 2.0
"""As long as the tightest limit of a test: what is shorter makes none of them fail."""


class Stillness:
    """Pauses of this process, seen by a thread that should wake every quarter of a second."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []
        """How long each took, in seconds."""
        self._before = 0
        self._woke = monotonic()
        threading.Thread(target=self._watch, name="stillness", daemon=True).start()

    def _watch(self) -> None:
        while True:
            sleep(STEP_S)
            slept_s = monotonic() - self._woke
            self._woke += slept_s
            if slept_s > STILL_S:
                self.pauses_s.append(slept_s)

    def begin(self) -> None:
        """From here on it counts: a test begins."""
        self._before = len(self.pauses_s)

    def happened(self) -> bool:
        """Whether the machine stood still since `begin`; a failed test may ask before the thread has woken."""
        asleep_s = monotonic() - self._woke
        return asleep_s > STILL_S or len(self.pauses_s) > self._before
