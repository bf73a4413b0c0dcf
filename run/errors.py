"""Errors that the user can fix. They end a run with one line instead of a traceback (launch.py)."""

from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can fix. The message names it and the remedy."""


class Stopped(Exception):
    """The run ends here and its state is saved. args: the line to print, the exit code."""


@contextmanager
def out_of_memory_advice(text):
    """If a GPU's memory runs out in here, the run's last line says where and what to turn down."""
    try:
        yield
    except Exception as error:  # by name: this file does not load torch
        if type(error).__name__ == "OutOfMemoryError":
            error.advice = text  # the outermost caller knows best which flag to lower
        raise
