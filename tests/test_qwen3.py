"""
Qwen3-Omni: its rows as prompts, its features, positions and logits against transformers' own forward,
whole runs with a tiny one, the published configuration, bad input.

    python -m pytest tests/test_qwen3.py
"""

import json
import math
import re
import shutil

import numpy as np
import published_configs
import pytest
import torch
from conftest import RECIPE, assert_same_values, launch
from media_files import make_row
from safetensors.torch import load_file, save_file
from test_run import same_weights, stage_0_killed_and_resumed, stopped_copy, without_times
from test_train_rl import read_metrics
from transformers.core_model_loading import revert_weight_conversion

import train_sft
from data.clip_cache import ClipCache
from data.clips import BadRow, Clip
from data.rows import Rows, normalize_row
from models import qwen, qwen3
from models.expert_replay import ExpertReplay
from models.inputs import InputBuilder, positions_after
from models.loading import expert_replay_of, load_policy, open_policies, wrap_policy
from models.policy import completion_logprobs
from models.rollout import Completion, rollout
from models.sharding import cast_params
from run.errors import UserError


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A folder with a tiny Qwen3-Omni, weights random."""
    folder = tmp_path_factory.mktemp("qwen3")
    launch("toy.py", "--backbone", "qwen3", "--stages", "--out", folder)
    return folder / "model"


# ---- against transformers' own forward ---------------------------------------------------------


def picture(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def sound(seed, num_samples):
    wave = np.random.default_rng(seed).normal(scale=0.1, size=num_samples)
    return wave.astype(np.float32)


FRAMES, FPS = picture(1, 6, 3, 64, 96), 1.7  # 2 / 1.7 * 13: positions between whole numbers
IMAGES = [picture(2, 3, 64, 64), picture(3, 3, 32, 96)]
SOUND = sound(4, 16000 * 9 + 700)  # more than one window of attention (8 s), no whole second
CASES = {
    "text": Clip(None, None, None, [], False),
    "image": Clip(None, None, None, IMAGES[:1], False),
    "several images": Clip(None, None, None, IMAGES, False),
    "video": Clip(FRAMES, FPS, None, [], False),
    "video with its sound": Clip(FRAMES, FPS, sound(5, 16000 * 3), [], True),
    "video with longer sound": Clip(FRAMES[:2], FPS, SOUND, [], True),
    "sound": Clip(None, None, SOUND, [], False),
    "several sounds": Clip(None, None, [SOUND, sound(6, 8000)], [], False),
    "video and sound beside it": Clip(FRAMES, FPS, SOUND, [], False),
    "images, video and its sound": Clip(FRAMES, FPS, SOUND, IMAGES, True),
}


def whole_forward(folder, thinker, clip, text, fps):
    """transformers' own: the processor's batch through the thinker -> batch, what the text model took, logits."""
    processor = InputBuilder(folder, RECIPE, ".", False).processor
    batch = processor(
        text=[text],
        images=clip.images or None,
        videos=None if clip.frames is None else [clip.frames],
        audio=clip.sounds or None,
        return_tensors="pt",
        load_audio_from_video=clip.use_audio,
        audio_from_video_indices=[0] if clip.use_audio else [],
        images_kwargs=dict(do_resize=False),
        videos_kwargs=dict(do_resize=False, do_sample_frames=False, fps=fps),
    )
    took = {}

    def remember(module, args, kwargs):
        took.update(kwargs)

    hook = thinker.model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        logits = thinker(**batch, use_audio_in_video=clip.use_audio).logits[0]
    hook.remove()
    return batch, took, logits


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_is_transformers_own_whole_forward(random_model, case):
    """Tokens, positions, embeddings, the middle layers' features and their places, logits."""
    clip = CASES[case]
    build = InputBuilder(random_model, RECIPE, ".", False)
    row = make_row(question="What is where, and when?")
    prompt = build.from_clip(row, clip)
    policy = load_policy(random_model, 0, True).eval()
    kinds = ["image"] * len(clip.images) + ["video"] * (clip.frames is not None)
    kinds += [] if clip.use_audio else ["audio"] * len(clip.sounds)
    text = build.chat(build.processor, kinds, row, None, None)
    plain = type(policy.thinker).from_pretrained(random_model, dtype=torch.float32).eval()
    batch, took, logits = whole_forward(random_model, plain, clip, text, clip.fps)

    assert torch.equal(prompt.input_ids, batch["input_ids"][0])
    assert torch.equal(prompt.position_ids, took["position_ids"][:, 0])
    with torch.no_grad():
        (head,) = policy.embed([prompt])
        assert_same_values(head.embeds, took["inputs_embeds"][0])
        if clip.images or clip.frames is not None:
            assert torch.equal(head.visual, took["visual_pos_masks"][0])
            theirs = torch.cat(list(took["deepstack_visual_embeds"]), dim=1)
            assert_same_values(head.deepstack, theirs)
        else:
            assert not head.visual.any() and head.deepstack.shape == (0, 0)
        tail = prompt.input_ids[-4:], prompt.position_ids[:, -4:]
        hidden, _ = policy.packed_forward([head.first(-4)], [[tail]])
        assert_same_values(policy.thinker.lm_head(hidden), logits[-5:])


# ---- published configurations ------------------------------------------------------------------


def test_names_of_the_published_weights():
    """
    The true 30B-A3B configuration, on the meta device: as transformers saves it, every name and shape is
    a published one, and none is left over.
    """
    with torch.device("meta"):
        thinker = qwen3.Thinker(qwen3.Thinker.config_class(**published_configs.QWEN3_30B_A3B))
    saved = revert_weight_conversion(thinker, thinker.state_dict())
    saved = {f"thinker.{name}": tuple(value.shape) for name, value in saved.items()}
    published = published_configs.qwen3_weights()
    assert saved == published
    audio = [shape for name, shape in published.items() if "audio_tower" in name]
    assert (len(published), len(audio)) == (18867 + 525 + 351, 525)
    assert 2 * sum(map(math.prod, audio)) == 1_295_854_336  # bytes in bfloat16, as audited
    # as printed by a project that built it from the hub's config.json
    assert sum(p.numel() for p in thinker.parameters()) == 31_719_205_488
    rotary = thinker.model.language_model.rotary_emb
    assert rotary.mrope_section == [24, 20, 20] and len(rotary.inv_freq) == 64


def test_lora_of_the_published_configuration_is_on_attention_alone():
    with torch.device("meta"):
        thinker = qwen3.Thinker(qwen3.Thinker.config_class(**published_configs.QWEN3_30B_A3B))
        policy = wrap_policy(thinker, lora_rank=16, train_towers=False)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    layers = {re.sub(r".*layers\.\d+\.|\.lora_.*", "", name) for name in trained}
    assert layers == {f"self_attn.{x}_proj" for x in "qkvo"} and len(trained) == 48 * 4 * 2


def test_the_3b_configuration_builds():
    with torch.device("meta"):
        thinker = qwen.Thinker(qwen.Thinker.config_class(**published_configs.QWEN25_3B))
        policy = wrap_policy(thinker, lora_rank=16, train_towers=True)
    weights = {n: p.numel() for n, p in thinker.named_parameters() if "lora" not in n}
    assert sum(n for name, n in weights.items() if "language_model" in name) == 3_085_938_688
    assert round(sum(weights.values()) / 1e9, 1) == 4.7
    assert policy.backbone is qwen


# ---- rows --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(random_model, toy_dir, tmp_path_factory):
    """A folder with a tiny Qwen3-Omni that knows the format, and rows of every stage."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(random_model, folder / "random")
    for stage in range(4):
        shutil.copytree(toy_dir / f"stage{stage}", folder / f"stage{stage}")
    lines = (folder / "stage0" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    few = []  # of different answers, so that rewards differ; short, so that they are soon learned
    for heard in (True, False):
        answers = {row["answer"]: row for row in rows if row["use_audio"] == heard}
        few += list(answers.values())[:3]
    short = [row | dict(reasoning=f"so {row['answer']}") for row in few]
    write_jsonl(folder / "stage0" / "few.jsonl", short)
    flags = "--steps 30 --batch-size 6 --lr 0.003 --save-every 0 --no-train-towers".split()
    where = "--model", folder / "random", "--data", folder / "stage0" / "few.jsonl"
    launch("train_sft.py", *where, *flags, "--out", folder / "sft")
    shutil.move(folder / "sft" / "final", folder / "model")
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "fields",
    [
        dict(images=["good.png", "good.jpg"]),
        dict(audio="good.wav"),
        dict(video="good.mp4", use_audio=False),
        dict(video="good.mp4", use_audio=True),
        dict(video="silent.mp4", audio="good.wav"),
        dict(images=["good.png"], video="good.webm", use_audio=True),
    ],
)
def test_another_question_about_a_clip_needs_no_second_look(random_model, media, fields):
    build = InputBuilder(random_model, RECIPE, media, False)
    row = normalize_row(make_row(**fields))
    other = normalize_row(make_row(**fields, prompt_id="other", question="Why, then?"))
    prompt = build(row)
    for of, hint in ((row, None), (other, "look left")):
        cached, fresh = build.with_text(prompt, of, hint), build(of, hint)
        assert torch.equal(cached.input_ids, fresh.input_ids)
        assert torch.equal(cached.position_ids, fresh.position_ids)
        assert cached.media is prompt.media


def test_positions_tell_the_real_time_of_a_long_clip(random_model):
    """13 a second, as the sound's tokens; a pair of frames has the position of what is heard with it."""
    build = InputBuilder(random_model, RECIPE._replace(max_prompt_tokens=9999), ".", False)
    frames = picture(1, 16, 3, 64, 64)
    for use_audio in (False, True):
        heard = sound(1, 60 * 16000) if use_audio else None
        prompt = build.from_clip(make_row(), Clip(frames, 16 / 60, heard, [], use_audio))
        video = prompt.input_ids == build.config.video_token_id
        times = prompt.position_ids[0, video].view(8, -1)  # 16 frames in pairs, 7.5 s each
        assert ((times - times[0, 0]) == 7.5 * 13 * torch.arange(8)[:, None]).all()
        if use_audio:
            tokens = prompt.position_ids[0, prompt.input_ids == build.config.audio_token_id]
            assert torch.equal(tokens - times[0, 0], torch.arange(60.0 * 13))
            # the second pair stands right behind the sound of the first one's 7.5 s
            second = int(video.nonzero()[4])
            before = prompt.input_ids[second - 1], prompt.position_ids[0, second - 1]
            assert before == (build.config.audio_token_id, times[0, 0] + 97)


def test_a_thinking_checkpoint_opens_the_reasoning_itself(random_model, tmp_path):
    """Its template ends with <think>: a completion says the rest, and is read with it."""
    folder = tmp_path / "Qwen3-Omni-30B-A3B-Thinking"
    shutil.copytree(random_model, folder)
    template = (folder / "chat_template.jinja").read_text()
    opened = template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    (folder / "chat_template.jinja").write_text(opened)
    build = InputBuilder(folder, RECIPE, ".", False)
    row = make_row(reasoning="so 4", answer="4")
    prompt = build.from_clip(row, CASES["image"])
    assert build.tokenizer.decode(prompt.input_ids).endswith("<think>\n")
    completion = train_sft.encode_completion(build, row)
    said = build.texts([Completion(completion, None, False)])
    assert said == ["<think>so 4</think><answer>4</answer>"]


# ---- the policy --------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_rollout_and_of_whole_sequences(tiny):
    """Packed rows, shared clips and rollouts against transformers' own thinker, a completion at a time."""
    policy, prompts = load_policy(tiny / "model", 0, True), []
    for stage in (3, 1, 2):
        rows = Rows(tiny / f"stage{stage}" / "train.jsonl")
        build = InputBuilder(tiny / "model", RECIPE, rows.path.parent, False)
        prompts.append(build(rows[0]))
    encoded = policy.with_encoded_media(prompts[-1])
    # two questions about one clip, its features as the cache of clips keeps them
    prompts[-1:] = [encoded, build.with_text(encoded, rows[1])]
    seeds = range(len(prompts))
    groups = rollout(
        policy,
        prompts,
        [3, 2, 2, 3],
        temperature=1.3,
        max_new_tokens=24,
        eos_ids=build.eos_ids,
        seeds=seeds,
    )
    ids = [[c.ids for c in group] for group in groups]
    with torch.no_grad():
        logprobs, _, _ = completion_logprobs(policy, prompts, ids, 1.3)
    plain = qwen3.Thinker.from_pretrained(tiny / "model", dtype=torch.float32)
    of_rows = iter(logprobs)
    for prompt, group in zip(prompts, groups):
        for completion in group:
            ours = next(of_rows)[: len(completion.ids)]
            assert_same_values(completion.logprobs, ours, rel=2e-5)
            assert_same_values(
                ours, whole_logprobs(policy, plain, prompt, completion.ids, 1.3), 2e-5
            )


def whole_logprobs(policy, plain, prompt, ids, temperature):
    """Log-probs of one completion by transformers' text model, which gets the features as in its thinker."""
    (head,) = policy.embed([prompt])
    embeds = torch.cat([head.embeds, plain.get_input_embeddings()(ids)])
    after = positions_after(prompt.position_ids, len(ids))
    visual = torch.cat([head.visual, torch.zeros(len(ids), dtype=torch.bool)])
    with torch.no_grad():
        hidden = plain.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=torch.cat([prompt.position_ids, after], dim=1)[:, None],
            visual_pos_masks=visual[None],
            deepstack_visual_embeds=head.deepstack.split(embeds.shape[1], dim=1),
        ).last_hidden_state[0, len(head.embeds) - 1 : -1]
        logits = plain.lm_head(hidden) / temperature
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def test_a_shared_clip_is_encoded_once(tiny):
    """Questions about one clip, its towers run once and its features with the middle layers kept."""
    policy = load_policy(tiny / "model", 0, False)
    rows = Rows(tiny / "stage2" / "train.jsonl")
    build = InputBuilder(tiny / "model", RECIPE, rows.path.parent, False)
    cache = ClipCache(build, 10**9)
    row = rows[0] | dict(prompt_id="first")
    first = cache.get(row)
    calls = []
    hook = policy.thinker.model.visual.register_forward_hook(lambda *_: calls.append(1))
    first = policy.with_encoded_media(first)
    again = build.with_text(first, row | dict(question="What else?"))
    policy.embed([first, again])
    hook.remove()
    assert len(calls) == 1 and first.media["video"].shape[1] == 3 * 128


def test_the_update_takes_the_experts_of_the_rollout(tiny):
    """
    In bfloat16 the choice differs for some tokens, and their log-probs with it; with --replay-experts for
    none. Prompts, other completions and the reference policy choose freely.
    """
    policy = open_policies(
        tiny / "model",
        device=torch.device("cpu"),
        dtype="float32",
        attn="auto",
        lora_rank=0,
        train_towers=False,
        with_reference=False,
        replay_experts=True,
    )[0]
    cast_params(policy.parameters(), torch.bfloat16)
    rows = Rows(tiny / "stage2" / "train.jsonl")
    build = InputBuilder(tiny / "model", RECIPE, rows.path.parent, False)
    prompts = [build(rows[i]) for i in range(4)]
    groups = rollout(
        policy,
        prompts,
        [8] * 4,
        temperature=1.0,
        max_new_tokens=24,
        eos_ids=[-1],
        seeds=range(4),
    )
    replay = policy.expert_replay
    assert groups[0][0].experts.shape == (23, 4, 2)
    ids = [[c.ids for c in group] for group in groups]
    recorded = torch.stack([c.logprobs for group in groups for c in group])

    def gap():
        with replay.recording() as chosen, torch.no_grad():
            logprobs, _, _ = completion_logprobs(policy, prompts, ids, 1.0)
        taken = torch.stack([layer[-4 * 8 * 23 :] for layer in chosen], dim=1)
        rolled_out = torch.cat([c.experts for group in groups for c in group])
        same = (taken.sort(-1)[0] == rolled_out.sort(-1)[0]).all(-1)
        return (logprobs - recorded).abs(), same

    replayed, same = gap()
    assert same.all()
    with policy.reference():
        free, same = gap()
    assert not same.all() and replayed.max() < free.max()
    # a completion that was not rolled out
    ids[0][0] = ids[0][0].flip(0)
    replay.impose(prompts, ids, "cpu")
    assert (replay.imposed[:23] == -1).all() and (replay.imposed[23:] >= 0).all()
    replay.impose(prompts, [[torch.tensor([5])]] * 4, "cpu")  # read, but never by the rollout
    assert (replay.imposed == -1).all()


def test_experts_are_taken_again_where_the_backward_pass_computes_a_layer_once_more(tiny):
    """With other experts than the policy would choose: both gradients are of the same function."""
    gradients = []
    for again in (False, True):
        policy = load_policy(tiny / "model", 0, False)
        policy.expert_replay = expert_replay_of(policy)
        if again:
            policy.thinker.activation_checkpointing_enable(
                dict(use_reentrant=False, preserve_rng_state=False)
            )
        rows = Rows(tiny / "stage2" / "train.jsonl")
        prompt = InputBuilder(tiny / "model", RECIPE, rows.path.parent, False)(rows[0])
        ids = torch.arange(20, 31)
        experts = (torch.arange(10 * 4)[:, None] + torch.tensor([0, 3])) % 8  # any two
        completion = Completion(ids, None, False, experts.view(10, 4, 2).byte())
        policy.expert_replay.remember([prompt], [[completion]])
        logprobs, _, _ = completion_logprobs(policy, [prompt], [[ids]], 1.0)
        logprobs.sum().backward()
        text = policy.thinker.model.language_model
        gradients.append([p.grad for p in text.layers[0].parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_same_values(a, b)


def test_a_router_chooses_as_transformers_own(tiny):
    thinker = qwen3.Thinker.from_pretrained(tiny / "model", dtype=torch.float32)
    hidden = torch.randn(7, 128)
    for router in qwen3.routers(thinker):
        expected = router(hidden)
        ours = qwen3.route(router, hidden, lambda indices: indices)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_what_trains(tiny):
    """With an adapter attention alone, experts by a flag, the router never; else all of the text model."""

    def trained(*how, **kwargs):
        policy = load_policy(tiny / "model", *how, **kwargs)
        return {name for name, p in policy.named_parameters() if p.requires_grad}

    full, lora, experts = trained(0, False), trained(2, False), trained(2, True, lora_experts=True)
    assert all("language_model" in name or "lm_head" in name for name in full)
    assert any("mlp.gate.weight" in name for name in full)
    assert all("lora_" in name and "self_attn" in name for name in lora) and len(lora) == 32
    assert all("language_model" in name for name in lora)
    assert sum("mlp.experts" in name for name in experts) == 4 * 4
    for part in ("visual.blocks.0.attn.qkv", "visual.merger_list.1.mlp.2", "audio_tower.proj2"):
        assert any(part in name for name in experts), part
    assert not any("mlp.gate" in name for name in lora | experts)
    assert not any("patch_embed" in name for name in lora | experts)  # a convolution


# ---- whole runs --------------------------------------------------------------------------------


def rl_flags(tiny, stage, out, *more):
    words = "--judge toy --steps 3 --max-new-tokens 24 --prompts-per-step 2 --eval-every 0"
    words += " --lr 0.0005 --temperature 1.1"
    rows = tiny / f"stage{stage}" / "train.jsonl"
    where = "--model", tiny / "model", "--data", rows, "--out", out
    return "train_rl.py", "--stage", stage, *where, *words.split(), *more


def test_stage_0_killed_and_resumed(tiny, tmp_path):
    stage_0_killed_and_resumed(tiny, tmp_path)
    before, after = (
        load_policy(folder, 0, True).thinker
        for folder in (tiny / "random", tmp_path / "straight" / "final")
    )
    same = [n for n, p in before.named_parameters() if torch.equal(p, after.get_parameter(n))]
    assert not same, same  # router, experts, and all layers of the towers


@pytest.mark.parametrize("stage, algo", [(1, "avatar-gspo"), (2, "avatar"), (3, "avatar")])
def test_every_stage_with_replay_killed_and_resumed(tiny, tmp_path, stage, algo, monkeypatch):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    more = "--save-every", 1, "--keep", 9, "--prompts-per-step", 2 if stage == 2 else 4
    imposed = []  # share of the tokens of each update's pack
    if stage == 1:
        more += ("--replay-experts",)
        impose = ExpertReplay.impose

        def count(replay, *args):
            impose(replay, *args)
            imposed.append((replay.imposed >= 0).float().mean().item())

        monkeypatch.setattr(ExpertReplay, "impose", count)
    launch(*rl_flags(tiny, stage, straight, *more, "--algo", algo))
    if stage == 1:  # all that is fresh; what is drawn from the buffer is free
        assert max(imposed) == 1 and min(imposed) < 1
    metrics = read_metrics(straight)
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert all(m["logprob_gap"] < 1e-4 for m in metrics)
    assert metrics[-1]["buffer/size"] > 0 and max(m["grad_norm"] for m in metrics) > 0
    if stage == 2:
        stopped_copy(straight, resumed, 1)
        launch(*rl_flags(tiny, stage, resumed, *more, "--algo", algo, "--resume"))
        assert same_weights(straight, resumed)
        assert without_times(metrics) == without_times(read_metrics(resumed))


def test_lora_on_experts_and_towers_then_evaluation(tiny, tmp_path):
    lora = "--lora-rank", 2, "--lora-experts"
    launch(*rl_flags(tiny, 2, tmp_path / "lora", *lora, "--train-towers", "--steps", 2))
    final = tmp_path / "lora" / "final"
    targets = json.loads((final / "adapter_config.json").read_text())["target_parameters"]
    assert len(targets) == 8 and targets == sorted(targets)
    assert all(m["logprob_gap"] < 1e-4 for m in read_metrics(tmp_path / "lora"))
    where = "--model", final, "--data", tiny / "stage2" / "test.jsonl"
    printed = launch("eval.py", *where, "--out", tmp_path / "scores", "--max-new-tokens", 16)
    assert "sound heard in 8 of 8 videos" in printed
    more = "--model", final, "--train-towers", "--steps", 1
    launch(*rl_flags(tiny, 2, tmp_path / "next", *lora, *more))
    config = json.loads((tmp_path / "next" / "final" / "adapter_config.json").read_text())
    assert config["target_parameters"] == targets  # the adapter is trained on


def test_two_processes_are_one(tiny, tmp_path):
    """
    Stage 0 trains the towers too, sharded; one process hears nothing there, and leaves the other waiting
    for no tower. Stage 2 with an adapter on experts and attention.
    """
    lines = (tiny / "stage0" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    silent = [row for row in rows if not row["use_audio"]]
    heard = next(row for row in rows if row["use_audio"])
    file = tiny / "stage0" / "mixed.jsonl"
    write_jsonl(file, [*silent[:3], heard])
    for name, processes in (("one", 1), ("two", 2)):
        where = "--model", tiny / "model", "--data", file, "--out", tmp_path / f"sft-{name}"
        words = "--steps 2 --batch-size 4 --save-every 0".split()
        launch("train_sft.py", *where, *words, processes=processes)
        more = "--lora-rank", 2, "--lora-experts", "--steps", 2
        launch(*rl_flags(tiny, 2, tmp_path / name, *more), processes=processes)
    same_runs(tmp_path, "sft-", ("loss", "grad_norm"))
    same_runs(tmp_path, "", ("reward", "loss", "kl", "grad_norm", "off/ess_frac"))
    assert max(m["logprob_gap"] for m in read_metrics(tmp_path / "two")) < 1e-4


def same_runs(folder, kind, names):
    """A run of one process and one of two: metrics and weights alike but for the order of sums."""
    one, two = (read_metrics(folder / f"{kind}{name}") for name in ("one", "two"))
    for name in names:
        a, b = ([m[name] for m in metrics] for metrics in (one, two))
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)
    assert max(m["grad_norm"] for m in one) > 0
    first, second = (load_policy(folder / f"{kind}{x}" / "final", 0, True) for x in ("one", "two"))
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert_same_values(a, b, rel=2e-4, msg=name)


# ---- bad input ---------------------------------------------------------------------------------


def mistake(*words):
    printed = launch(*words, code=1)
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


def test_other_folders_are_one_line(random_model, toy_dir, tmp_path):
    def line_of(name, **changes):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(random_model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        rows = "--data", toy_dir / "stage2" / "train.jsonl", "--out", tmp_path / "scores"
        return mistake("eval.py", "--model", folder, *rows)

    # the class's own value, where config.json has none
    assert "position_id_per_seconds is 25" in line_of("25", position_id_per_seconds=25)
    assert "takes no question" in line_of("Qwen3-Omni-30B-A3B-Captioner")
    assert "qwen3_vl_moe" in line_of("vl", model_type="qwen3_vl_moe")
    assert "qwen3_omni_moe_talker" in line_of("talker", model_type="qwen3_omni_moe_talker")


def test_weights_of_a_talker_alone_are_one_line(random_model, tmp_path):
    """transformers would make a thinker of random numbers of them."""
    folder = tmp_path / "talker"
    shutil.copytree(random_model, folder)
    save_file(dict(other=torch.zeros(2)), folder / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(UserError, match="lacks 149 weights of the thinker"):
        load_policy(folder, 0, False)


def test_a_published_folder_loads(random_model, tmp_path):
    """Whole: a thinker among other parts, its names with a prefix, experts one by one."""
    folder = tmp_path / "whole"
    shutil.copytree(random_model, folder)
    state = load_file(random_model / "model.safetensors")
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in state
    state = {f"thinker.{name}": value for name, value in state.items()}
    state["talker.model.norm.weight"] = torch.zeros(2)
    save_file(state, folder / "model.safetensors", metadata=dict(format="pt"))
    thinker = json.loads((folder / "config.json").read_text())
    whole = dict(model_type="qwen3_omni_moe", thinker_config=thinker, enable_audio_output=False)
    (folder / "config.json").write_text(json.dumps(whole))
    loaded, expected = (load_policy(path, 0, False) for path in (folder, random_model))
    for (name, a), b in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert InputBuilder(folder, RECIPE, ".", False).config.position_id_per_seconds == 13


def test_a_frame_of_an_odd_size_is_named(random_model):
    build = InputBuilder(random_model, RECIPE, ".", False)
    frames = picture(1, 2, 3, 56, 64)
    with pytest.raises(BadRow, match="row r7: a frame of 64 x 56 pixels: .* multiples of 32"):
        build.from_clip(make_row(), Clip(frames, 2.0, None, [], False))
