"""
How processes begin together and end together; what a GPU machine may lack.

    python -m pytest tests/test_processes.py
"""

import os
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, launch

import train_rl
import train_sft
from models.policy import Policy
from models.rollout import rollout
from run import processes
from run.launch import run_main
from run.run_dir import check_versions
from training.hint_visits import stored_kls

ONE_FAILS = """
import sys, time
sys.path.insert(0, {root!r})
from run import processes
from run.launch import run_main
from run.signals import watch_signals

def main():
    processes.init("cpu")
    watch_signals()
    processes.all_gather_object(None)
    if processes.rank() == 1:
        raise ValueError("only here")
    {wait}

run_main(main)
"""


def python(*words, **env):
    """A Python of its own -> exit code, what it printed."""
    env = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k} | env
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


# ---- one rank that fails


def test_an_error_on_one_rank_ends_all(tmp_path):
    """The other waits for it in a collective that has six hours."""
    script = tmp_path / "script.py"
    script.write_text(ONE_FAILS.format(root=str(ROOT), wait="processes.all_gather_object(None)"))
    began = time.monotonic()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    code, printed = python(*torchrun, script)
    assert code == 1 and time.monotonic() - began < 60
    assert printed.count("ValueError: only here") == 1  # its traceback, once
    assert "script.py: rank 1 failed" in printed and "continue with: torchrun" in printed
    assert 'in main\n    raise ValueError("only here")' in printed


def test_an_error_of_one_process_is_pythons_own():
    with pytest.raises(ValueError, match="mine"):
        run_main(lambda: int("mine"))


# ---- out of memory


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def in_the_update(monkeypatch):
    monkeypatch.setattr(train_rl, "completion_logprobs", out_of_memory)
    batch = SimpleNamespace(prompts=[], completions=[])
    train_rl.add_gradient(None, [batch], 1, temperature=1.0, tas={}, clip_eps=0.2, kl_coef=0.0)


def in_stage_0(monkeypatch):
    monkeypatch.setattr(train_sft, "pack_sizes", out_of_memory)
    train_sft.add_gradient(None, [], [], 1)


def in_the_rollout(monkeypatch):
    rollout(out_of_memory, [], [], temperature=1.0, max_new_tokens=1, eos_ids=[], seeds=[])


def in_the_hints(monkeypatch):
    monkeypatch.setattr("training.hint_visits.completion_logprobs", out_of_memory)
    dummy = SimpleNamespace(prompt=None, entries=[])
    stored_kls(None, {"q": (None, [])}, dummy, 1.0)


def in_the_towers(monkeypatch):
    Policy.with_encoded_media(SimpleNamespace(encode=out_of_memory), None)


@pytest.mark.parametrize(
    "place, remedy",
    [
        (in_the_update, "the update: lower --micro-tokens"),
        (in_stage_0, "the update: lower --micro-tokens"),
        (
            in_the_rollout,
            "the rollout: lower --rollout-prompts",
        ),
        (
            in_the_hints,
            "reading stored completions again: lower --max-frames or --max-pixels, or --no",
        ),
        (in_the_towers, "the towers: lower --max-frames or --max-pixels"),
        (out_of_memory, "what every step needs"),
    ],
)
def test_out_of_gpu_memory_is_a_line_that_names_the_flag(place, remedy, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run_main(lambda: place(monkeypatch))
    assert f"out of GPU memory in {remedy}" in end.value.code and "\n" not in end.value.code


# ---- the beginning on GPUs


def test_processes_on_gpus_have_a_group_for_objects(monkeypatch):
    """Its waits may be long and need no GPU; those of kernels may not be long."""
    asked = []

    def note(name, found=None):
        return lambda *words, **kwargs: asked.append((name, *words, kwargs)) or found

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", note("device"))
    for name, found in dict(
        init_process_group=None,
        new_group="objects",
        all_gather_object=None,
        broadcast_object_list=None,
    ).items():
        monkeypatch.setattr(dist, name, note(name, found))
    monkeypatch.setattr(processes, "_objects", [])
    for name, value in dict(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8).items():
        monkeypatch.setenv(name, str(value))
    before = torch.are_deterministic_algorithms_enabled()
    assert processes.init("auto").type == "cuda"
    torch.use_deterministic_algorithms(before)
    gpu = torch.device("cuda", 1)
    assert asked[0] == ("device", gpu, {})
    kwargs = dict(timeout=timedelta(minutes=30), device_id=gpu)
    assert asked[1] == ("init_process_group", "nccl", kwargs)
    assert asked[2] == ("new_group", dict(backend="gloo", timeout=timedelta(hours=6)))
    processes.all_gather_object(7)
    processes.broadcast_object(7)
    assert asked[3][2:] == (7, "objects", {}) and asked[4][2:] == (0, "objects", {})


def test_the_allocators_setting_is_the_users_where_there_is_one():
    code = "import run.before_torch, os, sys; assert 'torch' not in sys.modules; "
    code += "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    assert python("-c", code)[1] == "expandable_segments:True\n"
    assert python("-c", code, PYTORCH_ALLOC_CONF="backend:native")[1] == "backend:native\n"
    assert python("-c", code, PYTORCH_CUDA_ALLOC_CONF="backend:native")[1] == "None\n"


# ---- what may be missing


def test_all_but_clips_works_without_pyav_and_torchaudio():
    """sys.modules: as if it were not installed."""
    names = "train_sft train_rl eval prepare toy models.policy".split()
    experiments = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    experiments.remove("hands_and_voices")  # it reads media files itself
    names += [f"experiments.{name}" for name in sorted(experiments)]
    code = "import sys; sys.modules.update(av=None, torchaudio=None); "
    code += f"import {', '.join(names)}; "
    code += "from data import clips; from run.launch import run_main; sys.argv = ['x.py']; "
    code += "run_main(lambda: clips.open_media('x.mp4', 'row 1'))"
    code, printed = python("-W", "ignore", "-c", code)
    assert code == 1, printed
    line = "no clip can be read without av and torchaudio: pip install -r requirements.txt"
    assert printed == f"x.py: {line}\n"


def test_another_transformers_is_one_line(monkeypatch):
    monkeypatch.setattr("run.run_dir.version", lambda package: "5.17.1")
    line = launch("train_rl.py", code=1)
    assert line.startswith("train_rl.py: transformers 5.17.1 is installed, and this code needs 5.")
    assert ": pip install transformers==5." in line and line.count("\n") == 1
    wanted = line.rpartition("==")[2].strip()
    monkeypatch.setattr("run.run_dir.version", lambda package: wanted.rpartition(".")[0] + ".99")
    check_versions()  # another patch release
