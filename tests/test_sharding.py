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
    """A thinker of about 100 MB, random."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    Thinker(bench.thinker_config(512, 1536, 6, 8, 2, 8192)).save_pretrained(folder)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_process_reads_the_model_for_all(folder, tmp_path):
    """tests/loaded_once.py compares every parameter, buffer and moment of AdamW, to the bit."""
    printed = launch("tests/loaded_once.py", folder, tmp_path, processes=2)
    for lora_rank in (0, 8):
        found = next(json.loads(x) for x in printed.splitlines() if x.startswith("{"))
        printed = printed.partition(json.dumps(found))[2]
        print(f"LoRA rank {lora_rank}, MB: {found}")
        assert found["size"] > 90 and min(found["plain"]) > found["size"]  # each had all of it
        assert found["once"][0] < 1.8 * found["size"]  # the whole, and its part
        assert found["once"][1] < 0.9 * found["size"]  # its part, and a tensor on its way
        # a checkpoint: weights and both moments are three times what trains; its part is a half
        assert found["resumed"][1] < 1.3 * found["size"]
        out = tmp_path / str(lora_rank)
        assert files(out / "final") == files(out / "plain")
    assert len(load_file(out / "final" / "adapter_model.safetensors")) == 2 * 7 * 6
