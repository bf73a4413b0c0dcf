"""
Two nodes: two agents of torchrun on this machine, one of which is killed.

    python -m pytest tests/test_nodes.py
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time

from conftest import ROOT, launch
from test_faults import lines, other_out, wait_for
from test_run import same_weights
from test_train_rl import rl_flags


def start(node, port, command, log):
    """An agent with one process; what it prints goes to `log`."""
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--node-rank",
        str(node),
    ]
    words += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    with open(log, "w") as file:
        return subprocess.Popen([*words, *map(str, command)], cwd=ROOT, stdout=file, stderr=file)


def children(agent):
    """The processes that an agent of torchrun has started, one for each rank."""
    pids = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout
    return list(map(int, pids.split()))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_nodes_one_of_them_killed(toy_dir, tmp_path):
    flags = rl_flags(toy_dir, 2, tmp_path / "whole", "--save-every", 1, "--eval-every", 0)
    launch(*flags, processes=2)  # on one node

    # node 1 goes, as a machine does: its agent and its process at once
    out, port = tmp_path / "run", free_port()
    both = [start(node, port, other_out(flags, out), tmp_path / f"{node}.log") for node in (0, 1)]
    wait_for(both[0], lambda: len(lines(out / "metrics.jsonl")) == 1)
    gone = [both[1].pid, *children(both[1])]
    for pid in gone:
        os.kill(pid, signal.SIGKILL)
    both[1].wait()
    began = time.monotonic()
    assert both[0].wait(timeout=60) != 0 and time.monotonic() - began < 60
    printed = (tmp_path / "0.log").read_text()
    (line,) = [
        line for line in printed.splitlines() if "another process of the run has ended" in line
    ]
    words = shlex.split(line.split("continue with: ")[1])
    assert words[:5] == ["torchrun", "--nnodes", "2", "--node-rank", "0"] and "--resume" in words
    assert words[5:11] == f"--nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}".split()

    # what it printed, in two processes of one node: the agents have nothing more to show
    launch(*words[11:], processes=2)
    assert same_weights(tmp_path / "whole", out)
