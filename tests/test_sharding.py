"""
Several processes and one model: it is read once, and each holds its part.

    python -m pytest tests/test_sharding.py
"""

import json

import pytest
import torch
from conftest import launch
from safetensors.torch import load_file
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from experiments import bench


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
    # the file holds 3 times the weights; rank 1 makes its half of two moments and of a gradient
    assert full["resumed"][1] < 1.8 * full["size"] < full["resumed"][0]
