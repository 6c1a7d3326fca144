"""The `hfkit` command and `python -m hfkit`, which `accelerate launch` and `torchrun` start as well."""

import gc
import signal
import sys


def main() -> None:
    """Run one command. Ctrl-C while Python imports or tears down ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background, where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hfkit import warm

    warm.run()  # returns unless a resident process took the command
    from hfkit.cli import app

    try:
        app.main()
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        warm.keep_alive()
        # Python would look through a million objects at exit: 1.0 of 5 seconds. Triton reports what stays as leaks.
        if "triton" not in sys.modules:
            gc.freeze()


if __name__ == "__main__":
    main()
