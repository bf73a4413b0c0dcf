"""
Runs a command's main(). Errors that the user can fix end it with one line instead of a traceback.
"""

import errno
import os
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path

from run.errors import Stopped, UserError
from run.io import safe_streams
from run.processes import rank, world_size
from run.resume import resume_command
from run.run_dir import check_versions, exit_stack
from run.signals import restore_signals

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
# gloo and NCCL have no exception class for it
PEER_GONE = "Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited"


def user_message(error, user_errors):
    """The one line for an error that the user can fix, or None for all others."""
    missing_paths = (FileNotFoundError, FileExistsError, NotADirectoryError)
    # some by name: this file does not load torch and safetensors
    kind = type(error).__name__
    if isinstance(error, (UserError, *user_errors, *missing_paths)):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in ("av", "torchaudio"):
        return f"{error}: pip install -r requirements.txt"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        is_denied = error.errno in (errno.EACCES, errno.EROFS)
        remedy = "give another path, or the right to use it" if is_denied else "make room"
        place = error.filename or "disk"
        return f"{place}: {error.strerror}: {remedy}, then {how_to_continue()}"
    if kind == "SafetensorError":
        return (
            f"cannot read or write a weights file ({error}): is the disk full, or the file cut off?"
        )
    if kind == "OutOfMemoryError":
        always = "what every step needs: use more GPUs, or start a new --out with --lora-rank 16"
        return f"out of GPU memory in {getattr(error, 'advice', always)}"
    if isinstance(error, RuntimeError) and world_size() > 1 and re.search(PEER_GONE, str(error)):
        line = "another process of the run has ended, see above"
        return f"rank {rank()}: {line}; continue with: {resume_command()}"
    return None


def how_to_continue():
    """The end of a remedy; only some commands have --resume."""
    has_resume = Path(sys.argv[0]).stem in ("train_rl", "train_sft", "eval")
    return "continue with --resume" if has_resume else "run the command again"


# of libraries, about calls that are not ours: (category, beginning of the message)
WARNINGS_TO_HIDE = [
    # peft asks transformers for a name that is being renamed, for every model that recomputes activations
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
]


def run_main(main, *user_errors):
    """
    Runs main() and exits. Of several processes, one that fails ends the others too: none waits for
    it forever.

    user_errors   more exceptions that are shown as one line, such as clips.BadRow
    """
    line, code = None, 0
    restore_signals()
    for category, message in WARNINGS_TO_HIDE:
        warnings.filterwarnings("ignore", message, category)
    with safe_streams():
        try:
            check_versions()
            main()
        except Stopped as stop:
            line, code = stop.args
        except KeyboardInterrupt:
            line, code = "stopped", 128 + signal.SIGINT
        except Exception as error:
            code = 1
            line = user_message(error, user_errors)
            if not line and world_size() == 1:
                raise
            if not line:
                traceback.print_exc()
                line = (
                    f"rank {rank()} failed with the error above; continue with: {resume_command()}"
                )
        finally:
            exit_stack.close()
            restore_signals()

    if line:
        line = f"{Path(sys.argv[0]).name}: {line}"
        if world_size() == 1 and code == 1:
            sys.exit(line)
        if rank() == 0 or code == 1:
            print(line, file=sys.stderr if code else sys.stdout, flush=True)
    if world_size() > 1 and code == 1:
        os._exit(code)  # the others may be waiting for this rank: torchrun ends them
    close_process_group()
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        # not through Python's own exit: gloo's threads may be left and abort there (pytorch#179291)
        os._exit(code)
    if line:
        sys.exit(code)


def close_process_group():
    if "torch" in sys.modules:  # a command that answered early has not loaded it
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
