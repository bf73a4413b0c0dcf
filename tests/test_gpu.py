"""
The path of a GPU on a machine without one: devices, and the CUDA graph of a decoded token.

    python -m pytest tests/test_gpu.py
"""

import copy
import json

import pytest
import torch
from conftest import assert_same_values, launch, random_completions, toy_prompts
from pretended_gpu import GPU, Graph, capture, on_gpu, pretended_gpu

from models import attention, fused_decode, graphs, loading, sharding
from models.loading import load_policy
from models.policy import completion_logprobs
from models.rollout import rollout


@pytest.fixture(scope="module")
def setup(toy_dir):
    """The toy's policy on the CPU, as a large one, and prompts with audio and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "CHECKPOINT_ABOVE_PARAMS", 0)  # activations are computed again
        policy = load_policy(toy_dir / "model", 0, train_towers=True)
    return policy, *toy_prompts(toy_dir)


def test_it_refuses_what_a_gpu_refuses():
    with pretended_gpu():
        a, b = torch.tensor([1.0, 2.0], device="cuda"), torch.tensor([3.0, 4.0])
        assert a.is_cuda and a.device == GPU and on_gpu(a + 1) and not on_gpu(a.cpu())
        assert (a + b.to(a)).tolist() == [4, 6] and b[torch.tensor([0])].tolist() == [3]
        for mistake in (lambda: a + b, lambda: b[a.long()], lambda: torch.cat([a, b])):
            with pytest.raises(RuntimeError, match="two devices"):
                mistake()
        for mistake in (a.sum().item, lambda: a[a > 1], lambda: torch.tensor([1.0], device="cuda")):
            with pytest.raises(RuntimeError, match="inside a capture"), capture(Graph()):
                mistake()


def test_what_comes_without_a_wait_only_goes_back():
    with pretended_gpu():
        a = torch.tensor([1.0, 2.0], device="cuda")
        host = sharding.on_host(a)
        assert not on_gpu(host) and host.to(a, non_blocking=True).tolist() == [1, 2]
        with pytest.raises(RuntimeError, match="may not have written yet"):
            host + 1
        assert (a.cpu() + 1).tolist() == [2, 3]


def test_a_graph_computes_when_it_is_replayed():
    with pretended_gpu():
        a, total, graph = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), Graph()
        with capture(graph):
            twice = 2 * a
            total += twice
        assert total.tolist() == [0, 0] and twice.isnan().all()
        graph.replay()
        a.fill_(3)
        graph.replay()
        assert total.tolist() == [8, 8] and twice.tolist() == [6, 6]
        del a
        with pytest.raises(AssertionError, match="freed"):
            graph.replay()


def test_rollout_on_a_gpu_gives_what_it_gives_on_a_cpu(setup, monkeypatch):
    """Rows leave and the room grows, and what was recorded before is not replayed over it."""
    policy, prompts, build = setup
    for name in ("GROWTH", "GPU_GROWTH"):
        monkeypatch.setattr(attention, name, 4)
    counts = [4, 2, 3]
    sampling = dict(temperature=1.0, max_new_tokens=60, eos_ids=build.eos_ids, seeds=[1, 2, 3])
    expected = rollout(policy, prompts, counts, **sampling)
    assert max(len(c.ids) for group in expected for c in group) > 40
    with pretended_gpu():
        there = copy.deepcopy(policy).to(GPU)
        media = [p._replace(media=m) for p, m in zip(prompts, there.encode(prompts))]
        Graph.waits = 0
        rolled = rollout(there, media, counts, **sampling)
    assert Graph.made > 2 and Graph.replays > 30
    assert Graph.waits < 20, "more than a few for the whole rollout: a wait a token"
    for group, expected_group in zip(rolled, expected, strict=True):
        for one, two in zip(group, expected_group, strict=True):
            assert one.ids.tolist() == two.ids.tolist()
            assert_same_values(one.logprobs, two.logprobs)


def test_encoded_clips_come_and_go_without_a_wait(setup):
    policy, prompts, _ = setup
    completions = random_completions([[5], [4], [7]])
    with torch.no_grad():
        expected, _, _ = completion_logprobs(policy, prompts, completions, 0.9)
    with pretended_gpu(), torch.no_grad():
        there = copy.deepcopy(policy).to(GPU)
        kept = [there.with_encoded_media(prompt) for prompt in prompts]
        assert all(f.on_its_way for prompt in kept for f in prompt.media.values())
        logprobs, _, _ = completion_logprobs(there, kept, completions, 0.9)
    assert_same_values(logprobs.cpu(), expected)


def test_windows_of_a_clip_at_once_are_those_one_by_one(setup):
    policy, prompts, _ = setup
    with torch.no_grad():
        expected = policy.encode(prompts)
        with pretended_gpu():
            there = copy.deepcopy(policy).to(GPU)
            for tower in there.towers:  # as qwen.encode does where the dtype has a kernel
                tower.config._attn_implementation_internal = "flash_windows"
            made = there.encode(prompts)
            for one, two in zip(made, expected, strict=True):
                for name in two:
                    torch.testing.assert_close(one[name].cpu(), two[name], atol=1e-5, rtol=1e-5)


def test_gradients_on_a_gpu_are_those_of_a_cpu(setup):
    policy, prompts, _ = setup
    completions = random_completions([[5, 9], [1, 12, 4], [7]])
    logprobs, _, _ = completion_logprobs(policy, prompts, completions, 0.9)
    logprobs.sum().backward()
    with pretended_gpu():
        there = copy.deepcopy(policy).to(GPU)
        again, _, _ = completion_logprobs(there, prompts, completions, 0.9)
        again.sum().backward()
        assert_same_values(again.cpu(), logprobs)
        for (name, p), q in zip(policy.named_parameters(), there.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:  # one of the audio tower is not used
                assert (q.grad.cpu() - p.grad).norm() <= 1e-4 * p.grad.norm(), name
    policy.zero_grad()


def test_in_bfloat16_the_log_probs_of_the_rollout_are_the_recomputed_ones(setup):
    policy, prompts, build = setup
    policy = copy.deepcopy(policy)
    sharding.cast_params(policy.parameters(), torch.bfloat16)
    prompts = [p._replace(media=m) for p, m in zip(prompts, policy.encode(prompts))]
    with pretended_gpu(), torch.no_grad():
        policy = policy.to(GPU)
        rolled = rollout(
            policy,
            prompts,
            [4, 2, 3],
            temperature=1.0,
            max_new_tokens=40,
            eos_ids=build.eos_ids,
            seeds=[1, 2, 3],
        )
        ids = [[c.ids for c in group] for group in rolled]
        logprobs, mask, _ = completion_logprobs(policy, prompts, ids, 1.0)
        recomputed = logprobs.cpu()[mask.cpu()]
    recorded = torch.cat([c.logprobs for group in rolled for c in group])
    gap = (recomputed - recorded).abs()
    assert gap.max() < 0.15 and gap.mean() < 0.02, gap


def kernels_of_a_token(policy, prompts, build, monkeypatch):
    """How many kernels the CUDA graph of a decoded token has."""
    captured = []
    begin = Graph.__init__
    monkeypatch.setattr(Graph, "__init__", lambda self: begin(self) or captured.append(self))
    with pretended_gpu(), torch.no_grad():
        rollout(
            copy.deepcopy(policy).to(GPU),
            prompts,
            [2, 2, 2],
            temperature=1.0,
            max_new_tokens=6,
            eos_ids=build.eos_ids,
            seeds=[1, 2, 3],
        )
    return len(captured[0].kernels)


@pytest.mark.parametrize("lora_rank, most", [(0, 700), (4, 1000)])
def test_a_token_of_28_layers_is_few_kernels(toy_dir, setup, monkeypatch, lora_rank, most):
    """In bfloat16, counted at 4 and 3 layers: every layer has as many."""
    _, prompts, build = setup
    policy = load_policy(str(toy_dir / "model"), lora_rank, train_towers=False)
    prompts = [p._replace(media=m) for p, m in zip(prompts, policy.encode(prompts))]
    policy.requires_grad_(False)
    sharding.cast_frozen(policy, torch.bfloat16)
    four = kernels_of_a_token(policy, prompts, build, monkeypatch)
    layers = policy.thinker.model.language_model.layers
    policy.thinker.model.language_model.layers = layers[:3]
    policy.thinker.config.text_config.num_hidden_layers = 3
    three = kernels_of_a_token(policy, prompts, build, monkeypatch)
    assert four + 24 * (four - three) < most


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_fused_token_is_that_of_the_layers(toy_dir, setup, monkeypatch, lora_rank):
    """With an adapter that changes much, and without: log-probs of the rollout are the recomputed ones."""
    _, prompts, build = setup
    policy = load_policy(str(toy_dir / "model"), lora_rank, train_towers=False)
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = [p._replace(media=m) for p, m in zip(prompts, policy.encode(prompts))]
    sampling = dict(temperature=1.0, max_new_tokens=30, eos_ids=build.eos_ids, seeds=[1, 2, 3])
    expected = rollout(policy, prompts, [3, 1, 2], **sampling)
    calls = []
    fused = fused_decode.FusedDecoder.__call__
    monkeypatch.setattr(
        fused_decode.FusedDecoder, "__call__", lambda *x: calls.append(1) or fused(*x)
    )
    with pretended_gpu():
        rolled = rollout(copy.deepcopy(policy).to(GPU), prompts, [3, 1, 2], **sampling)
    assert calls
    for group, expected_group in zip(rolled, expected, strict=True):
        for one, two in zip(group, expected_group, strict=True):
            assert one.ids.tolist() == two.ids.tolist()
            assert_same_values(one.logprobs, two.logprobs)


def test_no_memory_for_a_graph_is_not_no_graphs_for_ever(monkeypatch):
    def full(graph, **_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pretended_gpu():
        x = torch.ones(2, device="cuda")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "graph", full)
            plain = graphs.capture(lambda y: y + 1, (x,))
            assert plain(x).tolist() == [2, 2] and not graphs._capture_errors
        assert graphs.capture(lambda y: y + 1, (x,))(x).tolist() == [2, 2]
    assert Graph.made == 1


def test_training_on_a_gpu_is_training_on_a_cpu(toy_dir, tmp_path):
    rows = toy_dir / "stage2" / "train.jsonl"
    flags = ["--stage", 2, "--model", toy_dir / "model", "--data", rows]
    flags += ["--steps", 2, "--prompts-per-step", 2, "--max-new-tokens", 40, "--eval-every", 0]
    launch("train_rl.py", *flags, "--out", tmp_path / "cpu")
    with pretended_gpu():
        launch("train_rl.py", *flags, "--out", tmp_path / "gpu", "--device", "cuda")
    assert Graph.made and Graph.replays
    expected, made = (
        [json.loads(line) for line in (tmp_path / side / "metrics.jsonl").read_text().splitlines()]
        for side in ("cpu", "gpu")
    )
    assert len(made) == 2
    for key in ("reward", "loss", "kl", "grad_norm", "advantage_std", "off/ratio_max"):
        values = [[line[key] for line in lines] for lines in (made, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-6), key
