"""Whether the machine stood still: a paused machine's clocks go on, and every deadline of a test passes at once."""

import threading
import time

STEP_S = 0.25
STILL_S = 2.0
"""As long as the tightest limit of a test: what is shorter makes none of them fail."""


class Stillness:
    """Pauses of this process, seen by a thread that should wake every quarter of a second."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []
        """How long each took, in seconds."""
        self._before = 0
        threading.Thread(target=self._watch, name="stillness", daemon=True).start()

    def _watch(self) -> None:
        while True:
            began = time.monotonic()
            time.sleep(STEP_S)
            slept_s = time.monotonic() - began
            if slept_s > STILL_S:
                self.pauses_s.append(slept_s)

    def begin(self) -> None:
        """From here on it counts: a test begins."""
        self._before = len(self.pauses_s)

    def happened(self) -> bool:
        """Whether the machine stood still since `begin`."""
        return len(self.pauses_s) > self._before
