"""What every test starts from."""

from __future__ import annotations

import signal

# A shell that runs something in the background makes it ignore Ctrl-C, and so would every program
# that the tests start and end by that signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
