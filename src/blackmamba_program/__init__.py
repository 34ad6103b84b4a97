"""The installed program `blackmamba`: what runs before the package, whose import takes a second.

It is a package of its own, as nothing inside of `blackmamba` comes before `import blackmamba`.
"""

import os
import signal


def main() -> None:
    """Import and run the command line. Ctrl-C during the import ends the process with 130."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        from blackmamba.cli.main import entry_point
    else:  # there is nothing to clean up yet, and no library needs to cope with an exception
        before = signal.signal(signal.SIGINT, _leave)
        from blackmamba.cli.main import entry_point

        signal.signal(signal.SIGINT, before)
    entry_point()


def _leave(_signal: int, _frame: object) -> None:
    os._exit(130)
