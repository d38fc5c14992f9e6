"""Ctrl-C while a command of this package still imports: one line and status 130, no traceback.

Importing this module is enough; it must come before what takes long to import.
"""

import os
import signal
import sys


def _stop(*_) -> None:
    os.write(2, b"stopped while starting: nothing was begun\n")
    # an exception out of a half-imported extension may become any other
    os._exit(130)


def started() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, now that a command can answer it."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# what a program is called while it imports the package that holds it: by python -m, and by the
# script of an installation
_importing = os.path.basename("".join(sys.argv[:1])) in ("-m", "gpn-triton")
if _importing and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
