"""
The policy: packed log-probs, shared prompts, rollouts, gradients, LoRA, loading and saving.

    python -m pytest tests/test_model.py

The oracle is transformers' own forward, one completion at a time, with full logits. The model is the
toy's; the clips are real mp4 files.
"""

import copy
import weakref

import numpy as np
import pytest
import torch
from conftest import RECIPE, assert_same_values, launch, random_completions, toy_prompts
from peft.tuners.lora import Linear as LoraLinear
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

import models.rollout
from data.rows import Rows
from models import loading
from models.head import head_logprobs
from models.inputs import InputBuilder, Prompt, shared_clip_groups
from models.loading import CHECKPOINT_ABOVE_PARAMS, load_policy, open_policies
from models.paths import save_model
from models.policy import completion_logprobs
from models.rollout import rollout, sample
from run.errors import UserError
from run.packing import pack_sizes


@pytest.fixture(scope="module")
def setup(toy_dir):
    """Policy, the plain HF model, and prompts with audio, without, and of different lengths."""
    policy = load_policy(toy_dir / "model", lora_rank=0, train_towers=True)
    prompts, build = toy_prompts(toy_dir)
    assert "audio" in prompts[0].media and "audio" not in prompts[1].media
    return policy, Thinker.from_pretrained(toy_dir / "model"), prompts, build


def oracle_logprobs(hf, prompt, completion, temperature):
    """transformers' own forward on one whole sequence."""
    ids = torch.cat([prompt.input_ids, completion])[None]
    kwargs = {}
    if video := prompt.media.get("video"):
        kwargs.update(
            pixel_values_videos=video["pixels"],
            video_grid_thw=video["grid"],
            video_second_per_grid=torch.tensor([1.0]),
        )
    if audio := prompt.media.get("audio"):
        mask = torch.ones(1, audio["mel"].shape[1], dtype=torch.long)
        kwargs.update(
            input_features=audio["mel"][None], feature_attention_mask=mask, use_audio_in_video=True
        )
    logits = (
        hf(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits[0] / temperature
    )
    return logits.log_softmax(-1)[len(prompt.input_ids) - 1 : -1].gather(-1, completion[:, None])[
        :, 0
    ]


SIZES = ([5, 1, 9], [7], [2, 12])  # ragged, one of a single token


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_equal_hf(setup, temperature):
    policy, hf, prompts, _ = setup
    completions = random_completions(SIZES)
    logprobs, mask, entropy = completion_logprobs(policy, prompts, completions, temperature)
    flat = [(p, c) for p, group in zip(prompts, completions) for c in group]
    assert mask.sum(1).tolist() == [len(c) for _, c in flat]
    for i, (prompt, completion) in enumerate(flat):
        expected = oracle_logprobs(hf, prompt, completion, temperature)
        assert_same_values(logprobs[i, : len(completion)], expected)
    assert (logprobs[~mask] == 0).all() and (entropy[mask] > 0).all()


@pytest.mark.parametrize("lora_rank, checkpointing", [(0, False), (0, True), (2, False)])
def test_gradients_equal_copies(setup, toy_dir, lora_rank, checkpointing, monkeypatch):
    """One packed row against G whole copies, for every parameter of text model and towers."""
    _, hf, prompts, _ = setup
    monkeypatch.setattr(
        loading, "CHECKPOINT_ABOVE_PARAMS", 0 if checkpointing else CHECKPOINT_ABOVE_PARAMS
    )
    policy = load_policy(toy_dir / "model", lora_rank, True)
    hf = copy.deepcopy(hf)
    if lora_rank:
        torch.manual_seed(0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # they start at 0, and then the others have no gradient
                torch.nn.init.normal_(parameter, std=0.1)
        hf = copy.deepcopy(policy).model
        hf.get_base_model().model.language_model.set_attn_implementation("sdpa")
    completions = random_completions(SIZES)
    weights = torch.randn(sum(map(len, SIZES)), generator=torch.Generator().manual_seed(1))
    logprobs, _, _ = completion_logprobs(policy, prompts, completions, 1.0)
    (logprobs.sum(1) * weights).sum().backward()
    flat = [(p, c) for p, group in zip(prompts, completions) for c in group]
    sum(oracle_logprobs(hf, p, c, 1.0).sum() * w for (p, c), w in zip(flat, weights)).backward()
    expected = dict(hf.named_parameters())
    compared = 0
    for name, parameter in policy.model.named_parameters():
        other = expected[name].grad
        if other is None:  # audio_bos_eos_token is used by nobody
            assert parameter.grad is None, name
            continue
        compared += 1
        assert lora_rank == 0 or "lora_" in name
        scale = other.norm().clamp(min=1e-6)
        assert (parameter.grad - other).norm() / scale < 1e-4, name
    assert compared > 100


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_sharded_gradients_equal_those_of_one_process(toy_dir, lora_rank):
    """FSDP2 on two ranks, each with its own groups: tests/sharded_gradients.py compares."""
    script = "tests/sharded_gradients.py"
    printed = launch(script, toy_dir / "model", toy_dir / "stage2", lora_rank, processes=2)
    assert "parameters agree" in printed


def test_one_prompt_does_not_change_another(setup):
    """Neither the neighbours in the packed row, nor their order, nor the micro-batch."""
    policy, _, prompts, _ = setup
    completions = random_completions(SIZES)
    with torch.no_grad():
        together = completion_logprobs(policy, prompts, completions, 1.0)[0]
        reverse = completion_logprobs(policy, prompts[::-1], completions[::-1], 1.0)[0]
        alone = [
            completion_logprobs(policy, [p], [c], 1.0)[0] for p, c in zip(prompts, completions)
        ]
    rows = together.split([len(s) for s in SIZES])
    for row, other, single in zip(rows, reverse.split([len(s) for s in SIZES[::-1]])[::-1], alone):
        assert_same_values(row, other)
        assert_same_values(row[:, : single.shape[1]], single)


def test_rollout_logprobs_are_the_recomputed_ones(setup):
    policy, _, prompts, build = setup
    groups = rollout(
        policy,
        prompts,
        [4, 2, 3],
        temperature=1.0,
        max_new_tokens=30,
        eos_ids=build.eos_ids,
        seeds=[1, 2, 3],
    )
    assert [len(g) for g in groups] == [4, 2, 3]
    with torch.no_grad():
        logprobs, mask, _ = completion_logprobs(
            policy, prompts, [[c.ids for c in g] for g in groups], 1.0
        )
    recorded = pad_sequence([c.logprobs for g in groups for c in g], batch_first=True)
    assert (logprobs - recorded).abs().max() < 1e-4
    for c in (c for g in groups for c in g):
        ends = torch.isin(c.ids, torch.tensor(build.eos_ids))
        assert (
            not ends[:-1].any() and bool(ends[-1]) != c.truncated
        )  # EOS is inside, and nothing after it


def test_rollout_does_not_depend_on_the_batch(setup):
    """The same seed gives a prompt the same completions alone and among others, however many."""
    policy, _, prompts, build = setup
    together = rollout(
        policy,
        prompts,
        [4, 4, 4],
        temperature=1.0,
        max_new_tokens=25,
        eos_ids=build.eos_ids,
        seeds=[1, 2, 3],
    )
    for i in range(3):
        (alone,) = rollout(
            policy,
            [prompts[i]],
            [4],
            temperature=1.0,
            max_new_tokens=25,
            eos_ids=build.eos_ids,
            seeds=[i + 1],
        )
        assert [c.ids.tolist() for c in alone] == [c.ids.tolist() for c in together[i]]


@pytest.mark.parametrize("prompts_at_once", [1, 2])
def test_waves_of_prompts_sample_what_all_at_once_do(setup, prompts_at_once, monkeypatch):
    """And the keys and values of a wave are freed before the next begins."""
    policy, _, prompts, build = setup
    sampling = dict(temperature=1.0, max_new_tokens=25, eos_ids=build.eos_ids, seeds=[1, 2, 3])
    together = rollout(policy, prompts, [4, 2, 3], **sampling)
    waves = []
    prefill = models.rollout.prefill

    def watched_prefill(policy, prompts, *args):
        assert not any(attention() for attention in waves)
        logits, attention = prefill(policy, prompts, *args)
        waves.append(weakref.ref(attention))
        return logits, attention

    monkeypatch.setattr(models.rollout, "prefill", watched_prefill)
    split = rollout(policy, prompts, [4, 2, 3], **sampling, prompts_at_once=prompts_at_once)
    assert len(waves) == -(-3 // prompts_at_once)
    for group, other in zip(together, split, strict=True):
        for a, b in zip(group, other, strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            assert_same_values(a.logprobs, b.logprobs)


def test_greedy_rollout_equals_hf_generate(setup):
    policy, hf, prompts, build = setup
    for prompt in prompts:
        ((ours,),) = rollout(
            policy,
            [prompt],
            [1],
            temperature=0.0,
            max_new_tokens=12,
            eos_ids=build.eos_ids,
            seeds=[0],
        )
        kwargs = dict(
            pixel_values_videos=prompt.media["video"]["pixels"],
            video_grid_thw=prompt.media["video"]["grid"],
            video_second_per_grid=torch.tensor([1.0]),
        )
        if audio := prompt.media.get("audio"):
            mask = torch.ones(1, audio["mel"].shape[1], dtype=torch.long)
            kwargs.update(
                input_features=audio["mel"][None],
                feature_attention_mask=mask,
                use_audio_in_video=True,
            )
        ids = prompt.input_ids[None]
        theirs = hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=build.eos_ids,
            **kwargs,
        )[0, ids.shape[1] :]
        assert ours.ids.tolist() == theirs.tolist()


def test_sampling_follows_the_distribution():
    """Defect 9 of the authors' trainer: it sampled top-k, and stored log-probs that ignore it."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).repeat(20000, 1)
    noise = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, logprob = sample(logits, 0.5, noise)
    expected = (logits[0] / 0.5).softmax(-1)
    torch.testing.assert_close(token.bincount(minlength=4) / 20000, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logprob, expected.log()[token])
    assert sample(logits[:1], 1.0, torch.tensor([1 - 1e-12], dtype=torch.float64))[0] == 3


def test_head_in_chunks_is_the_head(monkeypatch):
    torch.manual_seed(0)
    head, hidden, targets = (
        torch.nn.Linear(8, 50, bias=False),
        torch.randn(37, 8, requires_grad=True),
        torch.randint(50, (37,)),
    )
    whole, entropy = head_logprobs(head, hidden, targets, 0.9)
    (grad,) = torch.autograd.grad(whole.sum(), hidden)
    monkeypatch.setattr("models.head.CHUNK", 10)
    chunked, chunked_entropy = head_logprobs(head, hidden, targets, 0.9)
    (chunked_grad,) = torch.autograd.grad(chunked.sum(), hidden)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(chunked_entropy, entropy)
    torch.testing.assert_close(chunked_grad, grad)
    torch.testing.assert_close(
        entropy, torch.distributions.Categorical(logits=head(hidden) / 0.9).entropy()
    )


def test_a_sampled_media_token_is_an_ordinary_token(setup):
    """The policy may sample <|AUDIO|>: it must not swallow a feature of the prompt."""
    policy, _, prompts, _ = setup
    media_token = policy.thinker.config.audio_token_id
    odd = [[torch.tensor([20, media_token, 21])], [torch.tensor([20, 22])], [torch.tensor([20])]]
    plain = [[torch.tensor([20, 30, 21])], [torch.tensor([20, 22])], [torch.tensor([20])]]
    with torch.no_grad():
        a, b = (
            completion_logprobs(policy, prompts, odd, 1.0)[0],
            completion_logprobs(policy, prompts, plain, 1.0)[0],
        )
    torch.testing.assert_close(a[:, 0], b[:, 0])
    torch.testing.assert_close(a[1:], b[1:])


@pytest.mark.parametrize("train_towers", [False, True])
def test_a_frozen_tower_is_held_once(toy_dir, train_towers):
    policy, reference = open_policies(
        str(toy_dir / "model"),
        device=torch.device("cpu"),
        dtype="auto",
        attn="auto",
        lora_rank=0,
        train_towers=train_towers,
        with_reference=True,
    )
    weights = [
        {id(p) for tower in x.towers for p in tower.parameters()} for x in (policy, reference)
    ]
    assert weights[0] and (weights[0] == weights[1]) == (not train_towers)
    assert not weights[0] & {id(p) for p in policy.parameters() if p.requires_grad} or train_towers
    assert policy.thinker.model.language_model is not reference.thinker.model.language_model
    assert not any(p.requires_grad for p in reference.parameters())


def test_missing_placeholder_is_an_error(setup):
    policy, _, prompts, _ = setup
    p = prompts[0]
    keep = (
        torch.arange(len(p.input_ids))
        != (p.input_ids == policy.thinker.config.audio_token_id).nonzero()[0, 0]
    )
    broken = p._replace(input_ids=p.input_ids[keep], position_ids=p.position_ids[:, keep])
    with pytest.raises(AssertionError, match="audio: .* placeholders"):
        completion_logprobs(policy, [broken], [[torch.tensor([20, 21])]], 1.0)


def test_encoded_media_stand_in_for_the_towers(setup):
    policy, _, prompts, _ = setup
    completions = random_completions(SIZES)
    with torch.no_grad():
        encoded = [p._replace(media=m) for p, m in zip(prompts, policy.encode(prompts))]
        torch.testing.assert_close(
            completion_logprobs(policy, encoded, completions, 1.0)[0],
            completion_logprobs(policy, prompts, completions, 1.0)[0],
        )


def test_encoders_run_once_a_rollout(setup):
    policy, _, prompts, build = setup
    calls = []
    hooks = [tower.register_forward_hook(lambda *_: calls.append(1)) for tower in policy.towers]
    rollout(
        policy,
        prompts,
        [8, 8, 8],
        temperature=1.0,
        max_new_tokens=20,
        eos_ids=build.eos_ids,
        seeds=[1, 2, 3],
    )
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2  # one for all videos, one for all sounds


def test_time_positions_of_an_aligned_clip(setup):
    """Golden values: one video token row a second, 25 ids a second, audio interleaved by 2 s."""
    _, hf, prompts, build = setup
    prompt, config = prompts[0], hf.config
    video = prompt.position_ids[0][prompt.input_ids == config.video_token_id]
    audio = prompt.position_ids[0][prompt.input_ids == config.audio_token_id]
    begin, seconds = video[0], len(video) // 4
    assert ((video - begin) == torch.arange(seconds).repeat_interleave(4) * 25).all()
    assert ((audio - begin) == torch.arange(25 * seconds)).all()
    order = (prompt.input_ids == config.audio_token_id).nonzero()[:, 0]
    assert (order[1:50] - order[:49] == 1).all() and (
        seconds <= 2 or order[50] - order[49] == 1 + 4 * min(2, seconds - 2)
    )


def test_a_new_adapter_is_the_same_everywhere(toy_dir):
    """Else each rank would shard its own, and a run killed before its first checkpoint differ."""
    torch.manual_seed(5)
    one = dict(load_policy(toy_dir / "model", 2, False).named_parameters())
    two = dict(load_policy(toy_dir / "model", 2, False).named_parameters())
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_lora_trains_only_the_adapter_and_reloads(setup, toy_dir, tmp_path):
    from peft import PeftModel

    _, _, prompts, build = setup
    policy = load_policy(toy_dir / "model", lora_rank=4, train_towers=False)
    completions = random_completions(SIZES)
    base = completion_logprobs(policy, prompts, completions, 1.0)[0].detach()
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        (-completion_logprobs(policy, prompts, completions, 1.0)[0].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = completion_logprobs(policy, prompts, completions, 1.0)[0]
        with policy.reference():
            torch.testing.assert_close(
                completion_logprobs(policy, prompts, completions, 1.0)[0], base
            )
    assert (after - base).abs().max() > 1e-2
    assert all("lora_" in n for n, p in policy.named_parameters() if p.requires_grad)
    save_model(policy, tmp_path / "final", build.processor)
    PeftModel.from_pretrained(Thinker.from_pretrained(toy_dir / "model"), tmp_path / "final")
    again = load_policy(tmp_path / "final", 0, False)  # merged
    with torch.no_grad():
        torch.testing.assert_close(
            completion_logprobs(again, prompts, completions, 1.0)[0], after, atol=1e-4, rtol=0
        )


def test_saved_folder_is_standard(setup, tmp_path):
    policy, _, prompts, build = setup
    save_model(policy, tmp_path / "final", build.processor)
    loaded = Thinker.from_pretrained(tmp_path / "final").state_dict()
    for name, value in policy.model.state_dict().items():
        assert torch.equal(loaded[name], value), name
    InputBuilder(tmp_path / "final", RECIPE, ".", False)


def test_an_adapter_adds_in_one_pass_what_peft_adds(toy_dir):
    """Value and gradients of every adapted layer, by PEFT's own forward beside it."""
    policy = load_policy(toy_dir / "model", 4, train_towers=True)
    layers = [m for m in policy.modules() if isinstance(m, LoraLinear)]
    assert len(layers) > 20
    for layer in layers:
        b = layer.lora_B["default"].weight
        torch.nn.init.normal_(b, std=0.1)
        x = torch.randn(2, 3, layer.in_features, requires_grad=True)
        found = []
        for forward in (layer.forward, lambda x, own=layer: type(own).forward(own, x)):
            y = forward(x)
            found.append(
                (y, *torch.autograd.grad((y * y).sum(), [x, b, layer.lora_A["default"].weight]))
            )
        for ours, theirs in zip(*found, strict=True):
            assert_same_values(ours, theirs)
        with policy.reference():
            torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_no_such_model():
    with pytest.raises(FileNotFoundError, match="no model at nowhere/model"):
        load_policy("nowhere/model", 0, False)


def test_pack_sizes():
    assert pack_sizes([5, 5, 5, 20, 1], 10) == [[0, 1], [2], [3], [4]]
    assert pack_sizes([3], 1) == [[0]]
    assert np.concatenate(pack_sizes(list(range(50)), 60)).tolist() == list(range(50))


# ---- questions about one clip


def about_one_clip(toy_dir, build, row, questions):
    """A Prompt a question, about one clip: as they would come alone, and sharing their media."""
    prompts = [build(dict(row, prompt_id=str(i), question=q)) for i, q in enumerate(questions)]
    return prompts, [p._replace(media=prompts[0].media) for p in prompts]


QUESTIONS = [
    "Which color?",
    "How many shapes are shown, and which tone is heard?",
    "Which color is it?",
]


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1], [3, 1, 2, 4, 2]])
def test_questions_about_one_clip_share_it(setup, toy_dir, counts):
    """The same completions as from prompts that are read one by one, with log-probs to 1e-5."""
    policy, _, prompts, build = setup
    rows = Rows(toy_dir / "stage2" / "train.jsonl")
    alone, shared = about_one_clip(toy_dir, build.at(rows.path.parent), rows[1], QUESTIONS)
    order = [shared[0], prompts[1], shared[1], prompts[0], shared[2]]  # other clips in between
    flat = [alone[0], prompts[1], alone[1], prompts[0], alone[2]]
    assert [len(f) for f in shared_clip_groups(order)] == [3, 1, 1]
    for temperature in (0.0, 1.0):
        made, known = (
            rollout(
                policy,
                batch,
                counts,
                temperature=temperature,
                max_new_tokens=20,
                eos_ids=build.eos_ids,
                seeds=range(5),
            )
            for batch in (order, flat)
        )
        for group, other in zip(made, known, strict=True):
            assert [c.ids.tolist() for c in group] == [c.ids.tolist() for c in other]
            for c, o in zip(group, other):
                assert_same_values(c.logprobs, o.logprobs)


def test_a_shared_clip_is_encoded_and_read_once(setup, toy_dir, monkeypatch):
    policy, _, _, build = setup
    rows = Rows(toy_dir / "stage2" / "train.jsonl")
    _, shared = about_one_clip(toy_dir, build.at(rows.path.parent), rows[1], QUESTIONS)
    num_read = []
    num_encoded = []
    plain_forward = policy.packed_forward
    plain_encode = policy.encode

    def packed_forward(heads, tails, record):
        num_read.append(
            sum(len(h.embeds) for h in heads) + sum(len(t) for g in tails for t, _ in g)
        )
        return plain_forward(heads, tails, record)

    def encode(prompts):
        num_encoded.append(len(prompts))
        return plain_encode(prompts)

    monkeypatch.setattr(policy, "packed_forward", packed_forward)
    monkeypatch.setattr(policy, "encode", encode)
    rollout(
        policy,
        shared,
        [1] * 3,
        temperature=0.0,
        max_new_tokens=4,
        eos_ids=build.eos_ids,
        seeds=range(3),
    )
    lengths = [len(p.input_ids) for p in shared]
    assert num_encoded == [1]
    assert len(num_read) == 1 and num_read[0] < lengths[0] + 0.6 * sum(lengths[1:])


def test_prompts_without_media_are_no_family(setup):
    policy, _, _, build = setup
    prompt = Prompt(torch.tensor([12, 9]), torch.arange(2).expand(3, -1), {})
    assert shared_clip_groups([prompt, prompt]) == [[0], [1]]
    (a,), (b,) = rollout(
        policy,
        [prompt] * 2,
        [1, 1],
        temperature=0.0,
        max_new_tokens=5,
        eos_ids=build.eos_ids,
        seeds=[0, 1],
    )
    assert a.ids.tolist() == b.ids.tolist()


def test_prompts_that_are_equal_or_differ_before_the_clip(setup):
    policy, _, prompts, build = setup
    twice = rollout(
        policy,
        [prompts[0]] * 2,
        [2, 2],
        temperature=1.0,
        max_new_tokens=8,
        eos_ids=build.eos_ids,
        seeds=[1, 1],
    )
    assert [c.ids.tolist() for c in twice[0]] == [c.ids.tolist() for c in twice[1]]
    other = prompts[0]._replace(input_ids=prompts[0].input_ids.roll(1))
    with pytest.raises(AssertionError, match="before the last of it"):
        rollout(
            policy,
            [prompts[0], other],
            [1, 1],
            temperature=0.0,
            max_new_tokens=4,
            eos_ids=build.eos_ids,
            seeds=[1, 1],
        )


# ---- broken weights


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_broken_weights_are_one_line_before_anything_is_scored(toy_dir, temperature):
    prompts, build = toy_prompts(toy_dir)
    policy = load_policy(toy_dir / "model", 0, False)
    with torch.no_grad():
        policy.thinker.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="not finite.*--model"):
        rollout(
            policy,
            prompts,
            [1] * len(prompts),
            temperature=temperature,
            max_new_tokens=2,
            eos_ids=build.eos_ids,
            seeds=[0] * len(prompts),
        )


def test_a_sampled_token_is_in_the_vocabulary():
    logits = torch.full((4, 300), float("nan"))  # more than one piece of the search
    token, _ = sample(logits, 1.0, torch.tensor([0.0, 0.3, 0.9, 1 - 1e-12], dtype=torch.float64))
    assert (token >= 0).all() and (token < 300).all()
