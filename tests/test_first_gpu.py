"""
The script for a first run on a GPU, on a CPU and on a pretended GPU.

    python -m pytest tests/test_first_gpu.py
"""

import copy
import json

import pytest
import torch
from conftest import assert_same_values, launch
from pretended_gpu import GPU, Graph, pretended_gpu

from experiments import bench, first_gpu
from models.policy import completion_logprobs


@pytest.fixture(scope="module")
def at():
    """The namespace of the steps, tiny, on the CPU, with the policy."""
    at = first_gpu.begin(tiny=True)
    at.policy = first_gpu.build_policy(at)
    at.tflops, at.gb_per_s = 1.0, 1.0
    return at


def test_the_script_runs_on_a_tiny_model(tmp_path, monkeypatch):
    """Every step has a result, and those that check something find it right."""
    # torchrun takes long to start: the next test forks what it would run
    here = [step for step in first_gpu.STEPS if step[2] is not first_gpu.two_processes]
    monkeypatch.setattr(first_gpu, "STEPS", here)
    printed = launch("experiments/first_gpu.py", tmp_path / "found.json", "--tiny")
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["device"].startswith("CPU") and result["versions"]["torch"] == torch.__version__
    found = {title: step["found"] for title, step in result["steps"].items()}
    assert list(found) == [title for title, _, _ in first_gpu.STEPS]
    assert not any("error" in step for step in found.values()), printed
    assert max(found["packed attention: right?"].values()) < 1e-5
    assert all(found[f"decode attention, B={b}: right? ms"]["out"] < 1e-5 for b in (1, 8))
    gaps = found["log-probs: the rollout's and the recomputed"]
    assert all(gap["max"] < 1e-4 for gap in gaps.values())
    sizes = ("lr 1e-05, 10 steps", "lr 1e-05, 400 steps")
    few, many = (found["adapter: what arrives in bfloat16"][size] for size in sizes)
    assert many["correlation"] > 0.98 and many["float32"] > 10 * few["float32"]
    gap = found["head: large logits"]
    assert gap["ours"] < 0.02 < gap["bfloat16"]
    assert found["vision tower: right? ms"]["difference"] < 1e-5
    assert found["update: s, kernels"]["kernels"][0][2] > 0
    assert found["a whole step; a checkpoint"]["same"] and found["host copies"]["same"]
    assert all(found[part]["ratio"] > 0 for part in list(found)[-2:])


def test_the_collectives_of_two_processes_are_right():
    found = json.loads(launch("experiments/collectives.py", processes=2).splitlines()[-1])
    assert found["processes"] == 2 and found["backend"] == "gloo"
    assert found["collectives"]["right"] and found["objects"]["right"]
    assert 0 < found["fsdp"] < 0.02  # rounded to bfloat16, summed in float32


def test_a_step_that_fails_stops_no_other(tmp_path, monkeypatch):
    def fails(at):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    steps = [("first", 5, fails), ("late", 481, fails), ("last", 5, lambda at: "reached")]
    monkeypatch.setattr(first_gpu, "STEPS", steps)
    launch("experiments/first_gpu.py", tmp_path / "found.json", "--tiny")
    found = json.loads((tmp_path / "found.json").read_text())["steps"]
    assert "out of memory" in found["first"]["found"]["error"]
    assert "in fails" in found["first"]["found"]["at"]
    assert "seconds left of 481" in found["late"]["found"]
    assert found["last"]["found"] == "reached"


def test_the_plain_way_is_the_same_model(at):
    inputs = bench.make_inputs(at.vocab, 32, 4, 8)
    ours, _, _ = completion_logprobs(at.policy, *inputs, 1.0)
    with first_gpu.plain_attention(at.policy):
        plain = bench.copies_logprobs(at.policy.thinker, *inputs)
    assert_same_values(ours, plain)


def test_the_steps_on_a_pretended_gpu(at):
    """Nothing of two devices is mixed, and nothing waits while a graph is captured."""
    on_gpu = copy.copy(at)
    on_gpu.device = "cuda"
    with pretended_gpu():
        on_gpu.policy = copy.deepcopy(at.policy).to(GPU)
        assert max(first_gpu.packed_is_right(on_gpu).values()) < 1e-5
        assert first_gpu.decode_is_right(on_gpu, num_prompts=2)["out"] < 1e-5
        assert first_gpu.host_copies(on_gpu)["same"]
        assert first_gpu.tower(on_gpu)["difference"] < 1e-5
        assert first_gpu.head_gap(on_gpu)["ours"] < 0.02
        assert all(gap["max"] < 1e-4 for gap in first_gpu.logprob_gap(on_gpu).values())
        first_gpu.packed_ms(on_gpu)
        first_gpu.decode(on_gpu, num_prompts=2)
        assert first_gpu.whole_step(on_gpu)["same"]
    assert Graph.made and Graph.replays
