"""
Ola: its parts against the original's, its rows as prompts, whole runs with a tiny one, bad input.

    python -m pytest tests/test_ola.py

What the original gives stands in ola_fixtures.safetensors; ola_fixtures.py says how it was made.
"""

import copy
import json
import shutil

import numpy as np
import ola_fixtures as original
import pytest
import torch
from conftest import RECIPE, assert_same_values, launch, random_completions
from media_files import make_row
from pretended_gpu import GPU, Graph, pretended_gpu
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_run import same_weights, stage_0_killed_and_resumed, stopped_copy, without_times
from test_train_rl import read_metrics
from transformers import Qwen2ForCausalLM

import toy
from data.clip_cache import ClipCache
from data.clips import BadRow, Clip, decode_clip
from data.rows import Rows, normalize_row
from models import ola
from models.inputs import InputBuilder, Prompt, shared_clip_groups
from models.loading import load_policy, load_to_answer
from models.modeling_ola import OlaForConditionalGeneration
from models.policy import Policy, completion_logprobs
from models.rollout import rollout
from models.toy_model import write_model

WHISPER, BEATS = "large-v3.pt", "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt"


@pytest.fixture(scope="module")
def known():
    """What the original gave; {name: shape} of its tiny weights, of its published ones: three files."""
    with safe_open(original.FILE, "pt") as file:
        about = {name: json.loads(text) for name, text in file.metadata().items()}
        return (
            {name: file.get_tensor(name) for name in file.keys()},
            about["tiny"],
            about["published"],
        )


@pytest.fixture(scope="module")
def published(known, tmp_path_factory):
    """A folder as the hub has it, and one with the sound encoders, tiny."""
    root = tmp_path_factory.mktemp("published")
    whole, whisper, beats = map(original.weights, known[1])
    # the published ones hold the sound encoders too; as in the original, their own files count
    whole["model.speech_encoder.whisper_model.conv1.bias"] = torch.zeros(32)
    for folder in ("ola", "encoders"):
        (root / folder).mkdir()
    save_file(whole, root / "ola" / "model.safetensors")
    (root / "ola" / "config.json").write_text(json.dumps(original.CONFIG))
    write_model(root / "toy", toy.WEIGHTS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (root / "toy" / name).read_text()
        for kind, token in ola.PLACES.items():  # the tokens that Qwen2.5 has at these places
            text = text.replace(f"<|{kind.upper()}|>", token)
        (root / "ola" / name).write_text(text)
    torch.save(dict(dims=original.WHISPER, model_state_dict=whisper), root / "encoders" / WHISPER)
    torch.save(dict(cfg=original.BEATS, model=beats), root / "encoders" / BEATS)
    return root


@pytest.fixture(scope="module")
def converted(published):
    """-> the folder, its thinker, its InputBuilder"""
    out = published / "converted"
    printed = launch(
        "models/ola.py", "convert", published / "ola", published / "encoders", "--out", out
    )
    assert "M weights" in printed
    build = InputBuilder(out, RECIPE, ".", False)
    build.config.min_frame_pixels = 0  # the fixtures' frames are small
    return out, load_policy(out, 0, True).thinker, build


def close(ours, theirs, rel=1e-5):
    assert_same_values(ours, theirs, rel=rel)


# ---- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", original.SIZES)
def test_frames_are_the_originals(known, converted, height, width):
    """Tower, table of positions resized, pooling, projector, and the marks between rows and frames."""
    visual, pixels = (
        converted[1].model.visual,
        original.picture(f"{height} {width}", 2, 3, height, width),
    )
    given = []
    hook = visual.projector.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    (features,) = visual([pixels])
    hook.remove()
    close(given[0].flatten(1, 2), known[0][f"tower {height} {width}"])
    close(visual.projector.lay_out(features, True), known[0][f"video {height} {width}"])


def test_frames_of_all_sizes_together_are_those_alone(converted):
    visual = converted[1].model.visual
    clips = [original.picture(f"{h} {w}", n, 3, h, w) for n, (h, w) in enumerate(original.SIZES, 1)]
    for together, clip in zip(visual(clips), clips):
        close(together, visual([clip])[0].detach())


def test_a_picture_is_the_originals_two_views(known, converted):
    low, high = (original.picture(f"view {h}", 1, 3, h, w) for h, w in original.SIZES[:2])
    prompt = Prompt(None, None, dict(image=dict(views=[(low[0], high[0])])))
    (features,) = ola.encode(converted[1].model, [prompt], "cpu", False)
    close(features["image"], known[0]["picture"])


def test_sound_is_the_originals(known, converted):
    """Both spectrograms, both encoders, side by side, ten frames to a token, a mark after each window."""
    tower, waves = converted[1].model.audio_tower, original.sound("sound", 2)
    media = ola.sound_windows(
        [waves.flatten().numpy()], converted[2].processor.feature_extractor, "row r"
    )
    close(media["mel"][..., ::8], known[0]["mel"])
    # a logarithm of small sums: other kernels round them otherwise
    close(media["fbank"][..., ::8], known[0]["fbank"], rel=1e-4)
    close(tower.speech(media["mel"]).last_hidden_state, known[0]["whisper"])
    close(tower.music(media["fbank"]), known[0]["beats"])
    close(tower.encode(media["mel"], media["fbank"]), known[0]["fused"])
    prompt = Prompt(None, None, dict(audio=media))
    (features,) = ola.encode(converted[1].model, [prompt], "cpu", False)
    close(features["audio"], known[0]["sound"])


@pytest.mark.parametrize("case", ["video and sound", "video", "sound", "image"])
def test_a_prompt_is_the_originals(known, converted, case):
    """
    The tokens around, frames before the sound whatever the text says, plain positions from 0 on: what
    the text model is given, and what it says.
    """
    _, thinker, build = converted
    sound = original.sound("sound", 2).flatten().numpy()
    frames, picture = None, []
    if "video" in case:
        frames = original.picture("frames", 3, 3, 32, 64)
    if "image" in case:
        picture = [original.picture("view 96", 1, 3, 96, 32)[0]]
    heard = sound if "sound" in case else None
    clip = Clip(frames, 2.0, heard, picture, use_audio="and" in case)
    words = "You are a helpful assistant.", original.QUESTION
    row = dict(prompt_id="r", question="", answer_type="text")
    prompt = build.from_clip(row, clip, turns=words)
    if "image" in case:  # the original's reduced view is PIL's: here the fixtures'
        low = original.picture("view 32", 1, 3, 32, 64)[0]
        prompt.media["image"]["views"] = [(low, picture[0])]
        prompt = prompt._replace(
            input_ids=retold(prompt.input_ids, build.config.image_token_id, low, picture[0])
        )
        prompt = prompt._replace(position_ids=torch.arange(len(prompt.input_ids)).expand(3, -1))
    policy = Policy(thinker, True)
    with torch.no_grad():
        (head,) = policy.embed([prompt])
        close(head.embeds, known[0][f"embeds, {case}"])
        assert prompt.position_ids.tolist() == [list(range(len(head.embeds)))] * 3
        tail = prompt.input_ids[-4:], prompt.position_ids[:, -4:]
        hidden, _ = policy.packed_forward([head.first(-4)], [[tail]])
        close(thinker.lm_head(hidden[-4:]), known[0][f"logits, {case}"])


def retold(ids, token, *views):
    """Tokens with as many places for a picture as these views need."""
    first = int((ids == token).nonzero()[0])
    count = 1 + sum(map(ola.num_tokens, views))
    return torch.cat([ids[:first], torch.full((count,), token), ids[first:][ids[first:] != token]])


def test_names_of_the_published_weights(known):
    """
    The true configuration, on the meta device: every published name becomes one of ours, with its
    shape, and none of ours is left over.
    """
    states = [
        {n: torch.empty(s, device="meta") for n, s in original.unfolded(f).items()}
        for f in known[2]
    ]
    whole, whisper, beats = states
    encoder = [name for name in whisper if name.startswith("encoder.")]
    assert [len(x) for x in (whole, encoder, beats)] == [685, 487, 252]
    state = (
        whole
        | {f"speech.{n}": v for n, v in whisper.items()}
        | {f"music.{n}": v for n, v in beats.items()}
    )
    ours = {name: tuple(value.shape) for name, value in ola.renamed(state).items()}
    sizes = [
        tiny | true
        for tiny, true in zip((original.CONFIG, original.WHISPER, original.BEATS), original.TRUE)
    ]
    with torch.device("meta"):
        thinker = OlaForConditionalGeneration(ola.config_of(*sizes))
    assert ours == {name: tuple(value.shape) for name, value in thinker.state_dict().items()}
    # the published shards are 4.88 + 4.93 + 4.99 + 3.14 GB: bfloat16, and BEATs in float32
    count = lambda *tensors: sum(x.numel() for x in tensors)  # noqa: E731
    num_bytes = 2 * count(*whole.values(), *(whisper[n] for n in encoder)) + 4 * count(
        *beats.values()
    )
    assert round(num_bytes / 1e9, 2) == 17.94


# ---- rows --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(toy_dir, tmp_path_factory):
    """A folder with a tiny Ola that knows the format, and rows of every stage."""
    folder = tmp_path_factory.mktemp("tiny")
    launch("toy.py", "--backbone", "ola", "--stages", "--out", folder / "made")
    shutil.move(folder / "made" / "model", folder / "random")
    for stage in range(4):
        shutil.copytree(toy_dir / f"stage{stage}", folder / f"stage{stage}")
    rows = [
        json.loads(line) for line in (folder / "stage0" / "train.jsonl").read_text().splitlines()
    ]
    few = [next(row for row in rows if row["use_audio"] == heard) for heard in (True, False)]
    with open(folder / "stage0" / "few.jsonl", "w") as file:
        for row in few:  # short, so that it is soon learned
            file.write(json.dumps(row | dict(reasoning=f"so {row['answer']}")) + "\n")
    flags = "--steps 40 --batch-size 2 --lr 0.003 --save-every 0 --no-train-towers".split()
    where = "--model", folder / "random", "--data", folder / "stage0" / "few.jsonl"
    launch("train_sft.py", *where, *flags, "--out", folder / "sft")
    shutil.move(folder / "sft" / "final", folder / "model")
    return folder


@pytest.fixture(scope="module")
def build(tiny, media):
    return InputBuilder(tiny / "model", RECIPE, media, audio_captions=False)


@pytest.mark.parametrize(
    "fields, has",
    [
        (dict(images=["good.png", "good.jpg"]), ["image"]),
        (dict(images=["tiny.png"], video="tiny.mp4"), ["image", "video"]),
        (dict(audio="good.wav"), ["audio"]),
        (dict(video="good.mp4", use_audio=False), ["video"]),
        (dict(video="good.mp4", use_audio=True), ["video", "audio"]),
        (dict(video="silent.mp4", audio="good.wav"), ["video", "audio"]),
        (dict(images=["good.png"], video="good.webm", use_audio=True), ["image", "video", "audio"]),
    ],
)
def test_every_kind_of_row_becomes_a_prompt(build, tiny, media, fields, has):
    row = normalize_row(make_row(**fields))
    prompt, policy = build(row), load_policy(tiny / "model", 0, False)
    clip = decode_clip(row, media, build.media_config)
    assert all(
        side % 32 == 0
        for x in [*clip.images, clip.frames]
        if x is not None
        for side in x.shape[-2:]
    )
    ids = {kind: getattr(build.config, f"{kind}_token_id") for kind in has}
    at = {kind: (prompt.input_ids == token).nonzero()[:, 0] for kind, token in ids.items()}
    order = torch.cat([at[kind] for kind in has])
    assert (order[1:] - order[:-1] == 1).all()  # one medium behind another: pictures, frames, sound
    assert build.tokenizer.decode(prompt.input_ids[order[-1] + 1 :][:1]).startswith("\n")
    with torch.no_grad():
        features = policy.encode([prompt])[0]
    assert {kind: len(x) for kind, x in features.items()} == {
        kind: len(x) for kind, x in at.items()
    }
    if "video" in has:
        height, width = (side // 32 for side in clip.frames.shape[2:])
        assert len(at["video"]) == 2 + len(clip.frames) * (height * (width + 1) + 1)
    if "audio" in has:
        assert len(at["audio"]) == 2 + 51  # 10 s, 5 tokens a second, and a mark
    # another question about the clip needs no second look at it
    other = normalize_row(make_row(**fields, prompt_id="other", question="Why, then?"))
    for asked, hint in ((row, None), (other, "look left")):
        retold, fresh = build.with_text(prompt, asked, hint), build(asked, hint)
        assert torch.equal(retold.input_ids, fresh.input_ids)
        assert torch.equal(retold.position_ids, fresh.position_ids)


def test_media_that_a_text_names_stand_where_it_names_them(build, media):
    clip = decode_clip(normalize_row(make_row(images=["good.png"])), media, build.media_config)
    clip = clip._replace(audio=[original.noise(name, 32000).numpy() for name in "ab"])
    pieces = [
        dict(type="audio", index=1),
        dict(type="text", text="or"),
        dict(type="image", index=0),
        dict(type="text", text="or"),
        dict(type="audio", index=0),
    ]
    prompt = build.from_clip(make_row(), clip, turns=("", pieces))
    ids = {name: getattr(build.config, f"{name}_token_id") for name in ("image", "audio")}
    names = [name for i in prompt.input_ids.tolist() for name, token in ids.items() if i == token]
    assert [a for a, b in zip(names, [*names[1:], None]) if a != b] == ["audio", "image", "audio"]
    plain = build.from_clip(make_row(), clip)
    assert not torch.equal(plain.media["audio"]["mel"], prompt.media["audio"]["mel"])


def test_small_frames_are_enlarged(build, media):
    """Below the area that the model has seen; the tiny one has no such bound."""
    row = normalize_row(make_row(video="good.mp4"))
    bounded = build.at(media)
    bounded.config = type(build.config)(**build.config.to_dict() | dict(min_frame_pixels=288 * 288))
    sides = bounded(row).media["video"]["pixels"].shape[2:]
    assert 250 * 250 < sides[0] * sides[1] <= 288 * 288 and all(side % 32 == 0 for side in sides)


# ---- the policy --------------------------------------------------------------------------------


def test_logprobs_are_those_of_whole_sequences_and_of_the_rollout(tiny):
    """Packed rows and rollouts against transformers' own Qwen2, one completion at a time."""
    policy, prompts = load_policy(tiny / "model", 0, True), []
    for stage, i in ((3, 0), (1, 0), (2, 1)):
        rows = Rows(tiny / f"stage{stage}" / "train.jsonl")
        build = InputBuilder(tiny / "model", RECIPE, rows.path.parent, False)
        prompts.append(build(rows[i]))
    completions = random_completions(([5, 1, 9], [7], [2, 12]))
    config = Qwen2ForCausalLM.config_class.from_dict(policy.thinker.config.text_config.to_dict())
    plain = Qwen2ForCausalLM(config)
    weights = policy.thinker.state_dict().items()
    plain.load_state_dict(
        {n.replace("language_model.", ""): v for n, v in weights if "language" in n or "lm_h" in n}
    )
    with torch.no_grad():
        logprobs, _, _ = completion_logprobs(policy, prompts, completions, 0.7)
        rows = iter(logprobs)
        embeds = [head.embeds for head in policy.embed(prompts)]
        for embed, group in zip(embeds, completions):
            for c in group:
                whole = torch.cat([embed, plain.get_input_embeddings()(c)])[None]
                logits = plain(inputs_embeds=whole).logits[0, len(embed) - 1 : -1] / 0.7
                close(next(rows)[: len(c)], logits.log_softmax(-1).gather(-1, c[:, None])[:, 0])
    made = rollout(
        policy,
        prompts,
        [4, 2, 3],
        temperature=1.0,
        max_new_tokens=24,
        eos_ids=build.eos_ids,
        seeds=[1, 2, 3],
    )
    with torch.no_grad():
        ids = [[c.ids for c in group] for group in made]
        logprobs, mask, _ = completion_logprobs(policy, prompts, ids, 1.0)
    flat = [c.logprobs for group in made for c in group]
    recorded = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
    assert (logprobs - recorded).abs().max() < 1e-4


def test_a_rollout_on_a_gpu_gives_what_it_gives_on_a_cpu(tiny):
    """On the pretended one: devices, and the CUDA graph of a decoded token."""
    policy, rows = load_policy(tiny / "model", 0, True), Rows(tiny / "stage2" / "train.jsonl")
    build = InputBuilder(tiny / "model", RECIPE, rows.path.parent, False)
    prompts = [build(rows[0]), build(rows[1])]
    sampling = dict(temperature=1.0, max_new_tokens=10, eos_ids=build.eos_ids, seeds=[1, 2])
    expected = rollout(policy, prompts, [2, 1], **sampling)
    with pretended_gpu():
        rolled = rollout(copy.deepcopy(policy).to(GPU), prompts, [2, 1], **sampling)
    assert Graph.replays > 4
    for one, two in zip(sum(rolled, []), sum(expected, []), strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        assert_same_values(one.logprobs, two.logprobs)


def test_a_shared_clip_is_encoded_and_read_once(tiny):
    policy, rows = load_policy(tiny / "model", 0, False), Rows(tiny / "stage2" / "train.jsonl")
    build, calls = InputBuilder(tiny / "model", RECIPE, rows.path.parent, False), []
    for tower in (policy.thinker.model.visual, policy.thinker.model.audio_tower.speech):
        tower.register_forward_hook(lambda *_: calls.append(1))
    clip_cache = ClipCache(build, 10**9, policy)
    asked = [
        dict(rows[1], prompt_id=str(i), question=q) for i, q in enumerate(("Which?", "How many?"))
    ]
    prompts = [clip_cache.get(row) for row in asked] + [clip_cache.get(asked[0], "look left")]
    assert shared_clip_groups(prompts) == [[0, 1, 2]] and all(p.is_encoded for p in prompts)
    together = rollout(
        policy,
        prompts,
        [2, 1, 2],
        temperature=1.0,
        max_new_tokens=8,
        eos_ids=build.eos_ids,
        seeds=range(3),
    )
    assert len(calls) == 2  # its frames once, its sound once
    for prompt, group, seed in zip(prompts, together, range(3)):
        (alone,) = rollout(
            policy,
            [prompt],
            [len(group)],
            temperature=1.0,
            max_new_tokens=8,
            eos_ids=build.eos_ids,
            seeds=[seed],
        )
        assert [c.ids.tolist() for c in alone] == [c.ids.tolist() for c in group]


def test_what_trains(tiny):
    """The text model; with --train-towers vision and projectors too; never the sound encoders."""
    trained = lambda policy: {n for n, p in policy.named_parameters() if p.requires_grad}  # noqa: E731
    full, towers, lora = (
        load_policy(tiny / "model", *how) for how in ((0, False), (0, True), (2, True))
    )
    assert all("language_model" in name or "lm_head" in name for name in trained(full))
    new = trained(towers) - trained(full)
    assert new == {
        n for n, _ in towers.named_parameters() if "visual" in n or "audio_tower.projector" in n
    }
    assert all("lora_" in name for name in trained(lora))
    for part in (
        "language_model.layers.3",
        "visual.layers.1",
        "visual.projector",
        "audio_tower.projector",
    ):
        assert any(part in name for name in trained(lora)), part
    assert not any("speech" in name or "music" in name for name in trained(lora) | trained(towers))


# ---- whole runs --------------------------------------------------------------------------------


def flags(tiny, stage, out, *more):
    rows = tiny / f"stage{stage}"
    words = (
        "--judge toy --steps 3 --max-new-tokens 24 --prompts-per-step 2 --eval-every 0 --lr 0.0005"
    )
    words += " --temperature 1.3"  # so that what it has learned by heart is not all it says
    where = "--model", tiny / "model", "--data", rows / "train.jsonl", "--out", out
    where += "--eval-data", rows / "test.jsonl"
    return "train_rl.py", "--stage", stage, *where, *words.split(), *more


def test_stage_0_towers_and_all_killed_and_resumed(tiny, tmp_path):
    stage_0_killed_and_resumed(tiny, tmp_path)
    before, after = (
        load_policy(f, 0, True).thinker.model
        for f in (tiny / "random", tmp_path / "straight" / "final")
    )
    changed = {
        n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))
    }
    assert "visual.patches.weight" in changed and "audio_tower.projector.newline" in changed
    assert not any("speech" in name or "music" in name for name in changed)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_with_replay_killed_and_resumed(tiny, tmp_path, stage):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    more = "--save-every", 1, "--keep", 9, "--prompts-per-step", 4 if stage == 3 else 2
    launch(*flags(tiny, stage, straight, *more))
    metrics = read_metrics(straight)
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert all(m["logprob_gap"] < 1e-4 for m in metrics)
    assert metrics[-1]["buffer/size"] > 0 and max(m["grad_norm"] for m in metrics) > 0
    if stage == 2:
        stopped_copy(straight, resumed, 1)
        launch(*flags(tiny, stage, resumed, *more, "--resume"))
        assert same_weights(straight, resumed)
        assert without_times(metrics) == without_times(read_metrics(resumed))


def test_lora_with_towers_then_evaluation(tiny, tmp_path):
    launch(*flags(tiny, 2, tmp_path / "lora", "--lora-rank", 2, "--train-towers", "--steps", 2))
    final = tmp_path / "lora" / "final"
    assert (final / "adapter_config.json").is_file()
    assert all(m["logprob_gap"] < 1e-4 for m in read_metrics(tmp_path / "lora"))
    where = "--model", final, "--data", tiny / "stage2" / "test.jsonl"
    printed = launch("eval.py", *where, "--out", tmp_path / "scores", "--max-new-tokens", 16)
    assert "sound heard in 8 of 8 videos" in printed
    records = [
        json.loads(x) for x in (tmp_path / "scores" / "records.jsonl").read_text().splitlines()
    ]
    assert len(records) == 8 and all(r["completion"] is not None for r in records)
    launch(*flags(tiny, 2, tmp_path / "next", "--model", final, "--lora-rank", 2, "--steps", 1))
    # the towers' part of the adapter stays, frozen
    weights = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (final, tmp_path / "next" / "final")
    ]
    assert weights[0].keys() == weights[1].keys()
    towers = [name for name in weights[0] if "visual" in name]
    assert towers and all(torch.equal(weights[0][name], weights[1][name]) for name in towers)


def same_values(one, two, name):
    a, b = ([m[name] for m in metrics] for metrics in (one, two))
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6, err_msg=name)


def test_two_processes_are_one(tiny, tmp_path):
    """Towers too, sharded; in stage 0 one of them hears nothing, and leaves the other waiting for no tower."""
    rows = [json.loads(x) for x in (tiny / "stage0" / "train.jsonl").read_text().splitlines()]
    file, silent = tiny / "stage0" / "mixed.jsonl", [row for row in rows if not row["use_audio"]]
    heard = next(row for row in rows if row["use_audio"])
    file.write_text("".join(json.dumps(row) + "\n" for row in [*silent[:3], heard]))
    for name, processes in (("one", 1), ("two", 2)):
        where = "--model", tiny / "model", "--data", file, "--out", tmp_path / f"sft-{name}"
        words = "--steps 2 --batch-size 4 --save-every 0".split()
        launch("train_sft.py", *where, *words, processes=processes)
        more = "--train-towers", "--steps", 2
        launch(*flags(tiny, 2, tmp_path / name, *more), processes=processes)
    one, two = (read_metrics(tmp_path / f"sft-{name}") for name in ("one", "two"))
    for name in ("loss", "grad_norm"):
        same_values(one, two, name)
    assert max(m["grad_norm"] for m in one) > 0
    first, second = (
        load_policy(tmp_path / f"sft-{name}" / "final", 0, True) for name in ("one", "two")
    )
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert_same_values(a, b, rel=2e-4, msg=name)

    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    for name in ("reward", "loss", "kl", "grad_norm"):
        same_values(one[:1], two[:1], name)  # later, rounding may change a sampled token
    for name in ("off/ess_frac", "off/ratio_mean", "off/ratio_max"):
        same_values(one, two, name)  # of completions of the first step, by the weights after it
    assert one[1]["off/ess_frac"] < 1 and one[0]["grad_norm"] > 0
    assert max(m["logprob_gap"] for m in two) < 1e-4


# ---- bad input ---------------------------------------------------------------------------------


def mistake(*words):
    printed = launch(*words, code=1)
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


def test_bad_encoders_are_one_line(published, tmp_path):
    whisper, beats = (
        torch.load(published / "encoders" / n, weights_only=True) for n in (WHISPER, BEATS)
    )

    class Code:
        def __reduce__(self):
            return print, ("executed",)

    def told(name, what, ola_folder=published / "ola"):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(published / "encoders", folder)
        if name:
            (folder / name).unlink()
        if what is not None:
            torch.save(what, folder / name)
        return mistake("models/ola.py", "convert", ola_folder, folder, "--out", tmp_path / "out")

    assert f"{WHISPER}: no such file" in told(WHISPER, None)
    assert f"{BEATS} does not load as tensors alone" in told(BEATS, dict(cfg=Code(), model={}))
    assert f"{WHISPER} has no dims and model_state_dict" in told(WHISPER, beats)
    assert f"{BEATS} has no cfg and model" in told(BEATS, dict(model=beats["model"]))
    assert "not the kind of BEATs" in told(
        BEATS, dict(beats, cfg=beats["cfg"] | dict(deep_norm=False))
    )
    small = dict(whisper, dims=whisper["dims"] | dict(n_audio_state=16))
    assert f"{WHISPER} and {BEATS} give 16 + 16 numbers a frame, not 48" in told(WHISPER, small)
    less = dict(whisper, model_state_dict=dict(list(whisper["model_state_dict"].items())[1:]))
    assert "weights are not as Ola's, such as model.audio_tower.speech.embed_" in told(
        WHISPER, less
    )
    assert "not Ola as published" in told(None, None, published / "converted")
    shutil.copytree(published / "ola", tmp_path / "ola")
    text = (published / "ola" / "tokenizer.json").read_text().replace("<|vision_pad|>", "<|other|>")
    (tmp_path / "ola" / "tokenizer.json").write_text(text)
    (tmp_path / "ola" / "tokenizer_config.json").unlink()
    assert "its tokenizer lacks <|vision_pad|>" in told(None, None, tmp_path / "ola")
    assert not (tmp_path / "out").exists()


def test_folders_of_other_models_are_one_line(published, tiny, tmp_path):
    rows = "--data", tiny / "stage2" / "train.jsonl", "--out", tmp_path / "x"
    line = mistake("train_rl.py", "--model", published / "ola", *rows)
    assert "ola_qwen" in line and "python -m models.ola convert" in line
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(dict(model_type="llama")))
    assert "llama" in mistake("eval.py", "--model", other, *rows)


def test_bad_rows_are_named(build):
    row = normalize_row(make_row(video="good.mp4"))
    frames = torch.zeros(2, 3, 56, 64, dtype=torch.uint8)
    with pytest.raises(
        BadRow, match="row r7: a frame of 64 x 56 pixels: Ola takes multiples of 32"
    ):
        build.from_clip(row, Clip(frames, 2.0, None, [], False))
    long = np.zeros(25 * 160000 + 1, np.float32)
    with pytest.raises(
        BadRow, match="row r7: 250 s of sound: Ola takes 25 windows of 10 s: set start"
    ):
        build.from_clip(row, Clip(None, None, long, [], False))


def test_beats_stays_in_float32(tiny):
    """As its weights were published; the rest computes in bfloat16."""
    policy = load_to_answer(str(tiny / "model"), torch.device("cpu"), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in policy.thinker.model.named_parameters()}
    music = {dtype for name, dtype in dtypes.items() if ".music." in name}
    rest = {dtype for name, dtype in dtypes.items() if ".music." not in name}
    assert music == {torch.float32} and rest == {torch.bfloat16}
    rows = Rows(tiny / "stage2" / "train.jsonl")
    build = InputBuilder(tiny / "model", RECIPE, rows.path.parent, False)
    prompt = build(rows[0])
    assert "audio" in prompt.media
    features = policy.with_encoded_media(prompt).media["audio"]
    assert features.isfinite().all()
