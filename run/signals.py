"""SIGTERM and Ctrl-C let the present step finish, save it, and end the run."""

import os
import signal
import time

from run.errors import Stopped
from run.processes import all_gather_object, rank
from run.resume import resume_command

SAME_SIGNAL_S = 3.0  # a second signal within this time is the launcher's copy of the first
_received = []  # [(signal number, time)] in the order of arrival


def watch_signals():
    """From here on the first SIGTERM or Ctrl-C ends the run after its step, the second at once."""

    def handle(number, frame):
        now = time.monotonic()
        if not _received and rank() == 0:  # os.write: print may be interrupted inside itself
            os.write(2, b"stopping after this step; press again after 3 seconds to stop at once\n")
        elif _received and now - _received[0][1] > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _received.append((number, now))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def restore_signals():
    """Python's own handlers again; forgets what was received."""
    _received.clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def seconds_since_signal():
    """Seconds since this process received its first signal; None before any."""
    return time.monotonic() - _received[0][1] if _received else None


def stop_requested():
    """The signal that any rank has received, or None. Every rank gets the same answer."""
    for received in all_gather_object(_received):
        for number, _ in received:
            return number
    return None


def save_and_maybe_stop(step, num_steps, save_every, save):
    """
    Saves every `save_every` steps, after the last one (the run may be lengthened later) and when a
    signal asked the run to stop.

    save     callable()     writes the checkpoint of this step
    raises   Stopped        after saving, if a signal asked for it
    """
    signal_number = stop_requested()
    is_due = save_every and (step % save_every == 0 or step == num_steps)
    if is_due or signal_number:
        save()
    if signal_number and step < num_steps:
        line = f"saved step {step}; continue with: {resume_command()}"
        raise Stopped(line, 128 + signal_number)
