"""Ctrl-C and SIGTERM in training: their effect waits until the state is saved."""

import signal
import threading


class EndSignals:
    """A context in which SIGINT and SIGTERM wait for `deliver`, if `waits` is set.

    They then have the effect that they have outside of the context: Ctrl-C raises a
    KeyboardInterrupt, and SIGTERM ends the process. A second signal has it at once. In another
    thread than the main one, Python allows no handlers, and nothing waits.

    Attributes:
        waits: Whether a signal has to wait.
        received: The signal that waits; None if there is none.
    """

    def __init__(self):
        self.waits = False
        self.received: int | None = None
        self._usual = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                usual = signal.getsignal(number)
                # One that is ignored, as by nohup, stays so; None is a handler not of Python.
                if usual not in (signal.SIG_IGN, None):
                    self._usual[number] = usual
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        self._restore()
        self.deliver()

    def deliver(self) -> None:
        """Gives the signal that waits its usual effect."""
        if self.received is not None:
            number, self.received = self.received, None
            signal.raise_signal(number)

    def _receive(self, number, _):
        self._restore()
        self.received = number
        if not self.waits:
            self.deliver()

    def _restore(self):
        while self._usual:
            signal.signal(*self._usual.popitem())
