"""Ctrl-C during a run: a request to end it, and not an error in the middle of it."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interruption:
    """Whether Ctrl-C was pressed, and whether it was pressed again."""

    def __init__(self):
        self.requested = False
        self.insisted = False


@contextlib.contextmanager
def heed_interruption() -> Iterator[Interruption]:
    """Within this context Ctrl-C is a request; a second one raises, as soon as Python
    runs.

    A handler of the user's own is left alone, and so are other threads than the main
    one, which may not handle signals.
    """
    interruption = Interruption()
    in_main_thread = threading.current_thread() is threading.main_thread()
    usual = signal.default_int_handler
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not usual:
        yield interruption
        return

    def handle(number, frame):
        if interruption.requested:
            interruption.insisted = True
            raise KeyboardInterrupt
        interruption.requested = True

    signal.signal(signal.SIGINT, handle)
    try:
        yield interruption
    except Exception as error:
        # If it is raised while a callback runs, JAX makes another error of it.
        if interruption.insisted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, usual)
