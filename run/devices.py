"""
The device that a run computes on: chosen, described in one line, and why a GPU of this machine is not used.
"""

import os
import re
from pathlib import Path

from run.errors import UserError

DRIVER = Path("/proc/driver/nvidia/version")  # Linux: there if NVIDIA's driver is loaded
# major version of the CUDA that torch was built for -> the oldest driver that runs it (NVIDIA's CUDA
# toolkit release notes, Linux)
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
HIDDEN = ("", "-1", "none", "void", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES: without GPUs


def choose_device(device):
    """
    --device -> "cpu" or "cuda"

    raises   UserError    a GPU is there, or was asked for, and torch cannot use it
    """
    import torch

    if device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    problem = unusable_gpu(torch.__version__, torch.version.cuda)
    if problem:
        raise UserError(f"{problem}, or give --device cpu")
    if device == "cuda":
        raise UserError("--device cuda: torch finds no GPU here: leave it out to run on the CPU")
    return "cpu"


def unusable_gpu(torch_version, cuda_version):
    """Why torch cannot use this machine's NVIDIA GPU, and what to do; None if there is no GPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN
    if hidden or not DRIVER.is_file():
        return None
    install = (
        "pip install torch torchaudio torchvision --index-url https://download.pytorch.org/whl/"
    )
    if cuda_version is None:
        return (
            f"this machine has an NVIDIA GPU, but torch {torch_version} is built for CPUs only: "
            f"install one for CUDA ({install}cu130)"
        )
    found = re.search(r"\b(\d{3})\.\d+", DRIVER.read_text())
    driver = int(found[1]) if found else 0
    needed = OLDEST_DRIVER.get(int(cuda_version.split(".")[0]), 0)
    if 0 < driver < needed:
        return (
            f"torch {torch_version} needs NVIDIA driver {needed} or newer, this machine has {driver}: "
            f"update the driver, install a torch for an older CUDA ({install}cu126)"
        )
    return (
        "this machine has an NVIDIA GPU, but torch cannot use it: see what `nvidia-smi` and "
        '`python -c "import torch; torch.cuda.init()"` say'
    )


def check_fallback(typed, device, num_processes, is_toy):
    """Raises UserError if several processes fell back to the CPU with a model too large for it."""
    if typed == "auto" and device.type == "cpu" and num_processes > 1 and not is_toy:
        raise UserError(
            f"torch finds no GPU, and {num_processes} processes would run this model on CPUs: run on "
            "a machine with GPUs, or give --device cpu if that is meant"
        )


def describe(device, num_processes):
    """'8 x NVIDIA H100 80GB HBM3' or 'CPU, 1 process with 2 threads'"""
    import torch

    if device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    num_threads = torch.get_num_threads()
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    return f"CPU, {processes} with {threads}"
