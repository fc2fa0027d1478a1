"""An engine without a thread of its own."""

from __future__ import annotations

from typing import Any

import fastdllm_ext as fd


class Stepped(fd.Engine):
    """An engine whose turns the test takes."""

    def _start(self) -> None:
        pass

    def turn(self) -> bool:
        """Whether there was something to do."""
        with self._lock:
            busy = self._let_in()
        if busy:
            self._scheduler.turn()
        return busy

    def run(self) -> None:
        while self.turn():
            pass

    def close(self, **arguments: Any) -> None:
        for request in self._open_requests():
            request.cancel()
        self.turn()
