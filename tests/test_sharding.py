"""
Several processes and one model: it is read once, each holds its part, and each saves its part.

    python -m pytest tests/test_sharding.py
"""

import json

import pytest
import spawned
import torch
from conftest import launch
from safetensors.torch import load_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from experiments import bench
from run import checkpoint
from run.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random thinker of about 110 MB in float32, on the disk in bfloat16 as the 7B's is."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = bench.thinker_config(
        hidden=512, intermediate=1536, layers=8, heads=8, kv_heads=2, vocab=4096
    )
    thinker = Thinker(config)
    thinker.to(torch.bfloat16).save_pretrained(folder)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_process_reads_the_model_for_all(folder, tmp_path, monkeypatch):
    """tests/loaded_once.py compares every parameter, buffer and moment of AdamW, to the bit."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**18))  # what is freed leaves the process
    (tmp_path / "checkpoints").mkdir()
    printed = launch("tests/loaded_once.py", folder, tmp_path, processes=2)
    full, lora = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    print(f"MB at the peak: full {full}, LoRA {lora}")
    for lora_rank in (0, 8):
        assert files(tmp_path / f"final-{lora_rank}") == files(tmp_path / f"plain-{lora_rank}")
    adapter = load_file(tmp_path / "final-8" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 8

    # A kernel that takes pages back meanwhile, as on a busy machine, makes peaks say nothing: a plain
    # load then seems smaller than the model. Nothing is concluded from such a measurement.
    loads = (full, lora)
    if any(min(load["plain"]) < 0.95 * load["size"] for load in loads):
        pytest.skip("memory at its peak could not be measured on this machine now")
    for load in loads:
        assert load["size"] > 100
        assert load["once"][0] < 1.8 * load["size"]  # the whole, and its part
        assert load["once"][1] < 0.8 * load["size"]  # its part, and a tensor on its way
    # half of two moments, and the pages of a file with half of weights and moments, which Linux counts
    assert max(full["resumed"]) < 2.8 * full["size"]


@pytest.mark.parametrize("saved_by, loaded_by", [(2, 2), (2, 1), (1, 3), (3, 2)])
def test_a_checkpoint_of_some_processes_is_loaded_by_others(tmp_path, saved_by, loaded_by):
    """tests/resharded.py compares every weight and every moment of AdamW, to the bit."""
    launch("tests/resharded.py", "save", tmp_path, processes=saved_by)
    saved = [path.name for path in tmp_path.glob("checkpoints/step-000001/rank-*")]
    assert len(saved) == saved_by
    printed = launch("tests/resharded.py", "load", tmp_path, processes=loaded_by)
    assert "all equal" in printed


def test_a_checkpoint_is_whole_if_the_files_of_all_processes_are(tmp_path):
    launch("tests/resharded.py", "save", tmp_path, processes=2)
    folder = tmp_path / "checkpoints" / "step-000001"
    assert checkpoint.read(folder)["step"] == 1
    torn = folder / "rank-001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert checkpoint.read(folder) is None
    torn.unlink()
    assert checkpoint.read(folder) is None


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    launch("tests/resharded.py", "save", tmp_path, processes=2)
    folder = tmp_path / "checkpoints" / "step-000001"
    before = files(folder)
    running = spawned.start(
        "tests/resharded.py", "save", tmp_path, processes=2, max_file_bytes=3000
    )
    printed = running.communicate()
    assert running.returncode == 1 and "Traceback" not in printed
    assert "checkpoint of step 1 could not be written" in printed and "--resume" in printed
    assert files(folder) == before and [*folder.parent.iterdir()] == [folder]


def test_a_checkpoint_of_an_earlier_version_is_one_line(tmp_path):
    folder = tmp_path / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match="earlier version"):
        checkpoint.newest(tmp_path)
