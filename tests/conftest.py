"""What all tests rely on."""

import signal


def pytest_configure() -> None:
    """Heed ctrl-c: a shell that starts the tests in the background has them, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
