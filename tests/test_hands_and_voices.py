"""
Hands and voices: people and pairs held out, answers that follow from the clips, ears of a Whisper, two steps.

    python -m pytest tests/test_hands_and_voices.py
"""

import json
import re
import struct
import wave

import av
import numpy as np
import pytest
import torch
import torchaudio
from conftest import assert_same_values, launch
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import toy
from data.clips import MediaConfig
from data.rows import Rows
from data.thumbnails import encode_picture
from experiments import ears, hands_and_voices, senses
from experiments.variants import KeptClips
from models import qwen
from models.inputs import InputBuilder
from models.loading import load_policy
from run.errors import UserError

SCRIPT = "experiments/hands_and_voices.py"
NUM_MELS = 80

# ---- pictures, sounds and a Whisper, generated


def write_hands(folder, num_people):
    """Person p shows digit d as a grey of its own; the numbers count on."""
    number = 100
    for person in range(num_people):
        for digit in range(10):
            picture = torch.full((3, 40, 40), 20 * digit + 5 * person, dtype=torch.uint8)
            path = folder / "Dataset" / str(digit) / f"IMG_{number}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_picture(picture))
            number += 1


def write_voices(folder, names):
    """Each digit is a tone of its own."""
    (folder / "recordings").mkdir(parents=True)
    for name in names:
        for digit in range(10):
            t = np.arange(2000) / 8000
            samples = (9000 * np.sin(2 * np.pi * (300 + 150 * digit) * t)).astype(np.int16)
            with wave.open(str(folder / "recordings" / f"{digit}_{name}_0.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes(samples.tobytes())


def write_ctranslate2(path):
    """A random Whisper of two layers, width 32, as CTranslate2 packs it."""
    rng = np.random.default_rng(0)
    variables = {"encoder/num_heads": np.array(2, np.int16)}

    def add(name, *shape):
        variables[f"encoder/{name}"] = rng.normal(0, 0.2, shape).astype(np.float16)

    for name, shape in (("conv1", (32, NUM_MELS, 3)), ("conv2", (32, 32, 3))):
        add(f"{name}/weight", *shape)
        add(f"{name}/bias", 32)
    for layer in range(2):
        for name, num_out, num_in in (
            ("self_attention/linear_0", 96, 32),
            ("self_attention/linear_1", 32, 32),
            ("ffn/linear_0", 64, 32),
            ("ffn/linear_1", 32, 64),
        ):
            add(f"layer_{layer}/{name}/weight", num_out, num_in)
            add(f"layer_{layer}/{name}/bias", num_out)
        variables[f"encoder/layer_{layer}/self_attention/linear_0/bias"][32:64] = 0  # keys
        for name in ("self_attention/layer_norm", "ffn/layer_norm"):
            add(f"layer_{layer}/{name}/gamma", 32)
            add(f"layer_{layer}/{name}/beta", 32)
    add("layer_norm/gamma", 32)
    add("layer_norm/beta", 32)
    variables["encoder/position_encodings/encodings"] = sinusoids(1500, 32).astype(np.float16)

    ids = {np.dtype(np.float16): 4, np.dtype(np.int16): 2}
    with open(path, "wb") as file:

        def write_name(name):
            file.write(struct.pack("<H", len(name) + 1) + name.encode() + b"\0")

        file.write(struct.pack("<I", 6))
        write_name("WhisperSpec")
        file.write(struct.pack("<II", 3, len(variables)))
        for name, array in variables.items():
            write_name(name)
            file.write(struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape))
            file.write(struct.pack("<BI", ids[array.dtype], array.nbytes) + array.tobytes())


def sinusoids(num_positions, width):
    """Whisper's positions: sines, then cosines, of wavelengths from 1 to 10,000 radians."""
    scales = np.exp(-np.log(10000) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(num_positions)[:, None] * scales[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """hands/, voices/, ears/ and out/, which the command has written from them."""
    folder = tmp_path_factory.mktemp("hands_and_voices")
    write_hands(folder / "hands", num_people=5)
    write_voices(folder / "voices", ["ann", "bob", "cy", "dee"])
    write_ctranslate2(folder / "model.bin")
    launch("experiments/ears.py", "--ctranslate2", folder, "--out", folder / "ears")
    with pytest.MonkeyPatch.context() as patch:  # senses that learn little
        patch.setattr(senses, "SOUNDS_PER_VOICE", 2)
        patch.setattr(senses, "EAR_STEPS", 5)
        build(folder, "out")
    return folder


def build(folder, out, *flags):
    sizes = ["--num-sft", 14, "--num-train", 7, "--num-test", 9, "--seconds", 3, 5]
    sizes += ["--eye-steps", 2]
    inputs = ["--hands", folder / "hands", "--voices", folder / "voices", "--ears", folder / "ears"]
    return launch(SCRIPT, *inputs, *sizes, "--out", folder / out, *flags)


def read_rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def pairs_of(row):
    """(shown, said) of each second, from the row's events"""
    return [tuple(map(int, re.findall(r"\d", event))) for event in row["events"]]


# ---- people and pairs


def test_a_new_person_begins_where_the_digit_falls(tmp_path):
    write_hands(tmp_path, num_people=3)
    # the second person's 4 was taken twice, the third's 7 is missing
    (tmp_path / "Dataset/4/IMG_114.JPG").rename(tmp_path / "Dataset/4/IMG_0114.JPG")
    (tmp_path / "Dataset/7/IMG_127.JPG").unlink()
    people = hands_and_voices.read_hands(tmp_path)
    assert [sorted(person) for person in people] == [list(range(10))] * 2
    numbers = [re.search(r"\d+$", person[3].stem)[0] for person in people]
    assert numbers == ["103", "113"]


def test_no_person_is_in_both_halves(folders):
    hands = hands_and_voices.read_hands(folders / "hands")
    voices = hands_and_voices.read_voices(folders / "voices")
    train_people, held_out_people = hands_and_voices.split_people(hands, voices)
    assert len(train_people.hands) == 4 and len(held_out_people.hands) == 1
    assert len(train_people.voices) == len(held_out_people.voices) == 2
    for people, others in zip(train_people, held_out_people):
        assert not [person for person in people if person in others]


def test_held_out_pairs_are_only_in_their_file(folders):
    held_out = set(hands_and_voices.HELD_OUT_PAIRS)
    assert len(held_out) == 10 == len({a for a, _ in held_out}) == len({b for _, b in held_out})
    assert not any(shown == said for shown, said in held_out)
    for split in ("sft", "train", "people"):
        for row in read_rows(folders / "out", split):
            assert not held_out & set(pairs_of(row)), row["prompt_id"]
    for row in read_rows(folders / "out", "combinations"):
        assert held_out & set(pairs_of(row)), row["prompt_id"]


# ---- answers


def solve(row):
    """The answer from the row's events and the words of its question, by other code."""
    pairs = pairs_of(row)
    question = row["question"]
    digit = int((re.search(r"(\d)\?", question) or [0, 0])[1])
    shown, said = [a for a, _ in pairs], [b for _, b in pairs]
    agree = [k for k, (a, b) in enumerate(pairs) if a == b]
    if row["kind"] == "said while":
        return str(said[shown.index(digit)])
    if row["kind"] == "shown while":
        return str(shown[said.index(digit)])
    if row["kind"] == "shown before":
        return str(shown[said.index(digit) - 1])
    if row["kind"] == "sum":
        k = next(k for k, word in enumerate(hands_and_voices.ORDINALS) if f" {word} " in question)
        return str(shown[k] + said[k])
    if row["kind"] == "agree count":
        return str(len(agree))
    if row["kind"] == "agree second":
        assert len(agree) == 1
        return hands_and_voices.ORDINALS[agree[0]]
    return "yes" if agree else "no"


@pytest.mark.parametrize("split", ["train", "people", "combinations"])
def test_answers_follow_from_the_clip(split):
    rng = np.random.default_rng(0)
    kinds = set()
    for i in range(210):
        (row,), seconds = hands_and_voices.make_rows(rng, split, i, (6, 12))
        assert 6 <= len(seconds) <= 12 and pairs_of(row) == seconds
        assert row["answer"] == solve(row), row
        if row["kind"].endswith("while") or row["kind"] == "shown before":
            number = re.search(r"(\d)\?", row["question"])[1]
            side = 0 if row["kind"] == "said while" else 1
            assert [pair[side] for pair in seconds].count(int(number)) == 1
        if row["answer_type"] == "choice":
            assert row["answer"] in row["options"] and len(set(row["options"])) == 4
        kinds.add(row["kind"])
    expected = hands_and_voices.KINDS
    if split == "combinations":
        expected = hands_and_voices.KINDS_OF_A_PAIR
    assert kinds == set(expected)


def test_a_guess_without_the_clip_solves_few():
    rng = np.random.default_rng(0)
    for split in ("train", "combinations"):
        rows = [hands_and_voices.make_rows(rng, split, i, (6, 12))[0][0] for i in range(700)]
        assert hands_and_voices.best_blind_guess(rows) < 0.3


def sft_rows(num_clips):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(num_clips):
        rows += hands_and_voices.make_rows(rng, "sft", i, (3, 5))[0]
    return rows


def test_a_clip_of_the_cold_start_has_several_questions():
    rows = sft_rows(num_clips=70)
    assert 350 < len(rows) < 7 * 70  # not every clip has a clear answer to each kind
    assert len({row["video"] for row in rows}) == 70
    assert len({row["prompt_id"] for row in rows}) == len(rows)
    assert len({(row["video"], row["kind"]) for row in rows}) == len(rows)


def test_reasonings_are_imperfect_as_they_should_be():
    rows = sft_rows(num_clips=200)
    hasty = [row for row in rows if row["reasoning"].startswith("it seems")]
    others = [row for row in rows if row not in hasty]
    assert 0.18 < len(hasty) / len(rows) < 0.3
    assert all(row["answer"] == solve(row) for row in others)
    assert sum(row["answer"] == solve(row) for row in hasty) < 0.4 * len(hasty)
    assert not any("hint" in row for row in hasty)


def answer_so_far(row, num_seconds):
    """The answer that follows from the first seconds, by other code; "open" if none does."""
    try:
        return solve(row | {"events": row["events"][:num_seconds]})
    except (ValueError, IndexError, AssertionError):
        return "open"


def difference_of(row, k):
    """What second k is off: from the digit that the question names, else shown minus said, as text."""
    shown, said = pairs_of(row)[k]
    if row["kind"] == "sum":
        return None
    if row["kind"].startswith(("agree", "ever")):
        return str(shown - said)
    wanted = int(re.search(r"(\d)\?", row["question"])[1])
    return str((shown if row["kind"] == "said while" else said) - wanted)


def test_a_told_row_says_what_happens_and_has_no_clip():
    rng = np.random.default_rng(0)
    for i in range(50):
        row = hands_and_voices.make_told_row(rng, i, (3, 5))
        assert row["answer"] == solve(row) and "video" not in row
        assert all(event in row["question"] for event in row["events"])


def test_each_line_notes_the_answer_so_far():
    num_lines = 0
    for row in sft_rows(num_clips=100):
        *lines, last = row["reasoning"].split("\n")
        if not lines:  # hasty
            continue
        for line in lines:
            second, event, difference, answer = re.fullmatch(
                r"(\d): (.*); (?:off (-?\d), )?(\w+)", line
            ).groups()
            assert event == row["events"][int(second) - 1]
            assert difference == difference_of(row, int(second) - 1)
            assert answer == answer_so_far(row, int(second)), row
            num_lines += 1
        assert last == f"so {answer}" == f"so {row['answer']}"
        assert toy.judge(row, lines) == [1.0] * len(lines)  # a note is no part of what is judged
    assert num_lines > 700


# ---- clips


def test_the_same_seed_writes_the_same_files(folders, tmp_path):
    hands = hands_and_voices.read_hands(folders / "hands")
    voices = hands_and_voices.read_voices(folders / "voices")
    train_people, held_out_people = hands_and_voices.split_people(hands, voices)
    sizes = {"sft": 14, "train": 7, "people": 9, "combinations": 9}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        (folder / "clips").mkdir(parents=True)
        for split, num_clips in sizes.items():
            people = held_out_people if split == "people" else train_people
            hands_and_voices.write_split(folder, split, num_clips, people, [3, 5], seed)
            text = (folders / "out" / f"{split}.jsonl").read_bytes()
            assert (text == (folder / f"{split}.jsonl").read_bytes()) == (seed == 0)
    clips = sorted((folders / "out/clips").iterdir())
    assert len(clips) == sum(sizes.values()) + 1  # and the blank picture
    for clip in clips:
        assert clip.read_bytes() == (tmp_path / "0/clips" / clip.name).read_bytes()


def test_a_clip_shows_and_says_what_its_events_are(folders):
    row = read_rows(folders / "out", "train")[0]
    with av.open(str(folders / "out" / row["video"])) as container:
        grey = [frame.to_ndarray(format="gray").mean() for frame in container.decode(video=0)]
    with av.open(str(folders / "out" / row["video"])) as container:
        audio = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    pairs = pairs_of(row)
    assert len(grey) == 4 * len(pairs)
    for k, (shown, said) in enumerate(pairs):
        assert abs(grey[4 * k + 2] - 20 * shown) < 25  # the greys of one digit span 0 to 20
        spectrum = np.abs(np.fft.rfft(audio[16000 * k : 16000 * (k + 1)]))
        assert abs(int(spectrum.argmax()) - (300 + 150 * said)) < 20  # Hz


# ---- ears


def test_ears_are_the_whisper_that_was_packed(folders):
    """The tower's layers, pooled and normed, are those of transformers' own Whisper encoder."""
    config = WhisperConfig.from_pretrained(folders / "ears")
    assert (config.num_mel_bins, config.d_model, config.encoder_layers) == (NUM_MELS, 32, 2)
    state = load_file(folders / "ears/model.safetensors")
    state = {name.removeprefix("model.encoder."): tensor for name, tensor in state.items()}
    positions = "embed_positions.weight"
    state[positions] = state[positions][:100]  # 2 s, the window of the tower
    config.max_source_positions = 100
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(state)

    thinker = qwen.Thinker.from_pretrained(folders / "out/model")
    tower = thinker.model.audio_tower.eval()
    mel = torch.randn(1, NUM_MELS, 200, generator=torch.Generator().manual_seed(0))
    before_norm = []
    encoder.layer_norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    with torch.no_grad():
        encoder(mel)
        pooled = torch.nn.functional.avg_pool1d(before_norm[0].transpose(1, 2), 2, 2)
        expected = tower.proj(encoder.layer_norm(pooled.transpose(1, 2)))[0]
        lengths = torch.tensor([200])
        after_conv, _ = tower._get_feat_extract_output_lengths(lengths)
        heard = tower(mel[0], lengths, after_conv).last_hidden_state
    assert_same_values(heard, expected, rel=1e-3)  # positions are stored in float16


def test_features_are_whispers_own(folders):
    """80 mels by the formula of whisper/audio.py, with torchaudio's filters."""
    extractor = WhisperFeatureExtractor.from_pretrained(folders / "ears")
    samples = torch.randn(480000, generator=torch.Generator().manual_seed(0)) * 0.1
    samples[100000:] = 0  # a recording and silence up to 30 s
    ours = extractor(samples.numpy(), sampling_rate=16000, return_tensors="pt").input_features[0]

    spectrum = torch.stft(samples, 400, 160, window=torch.hann_window(400), return_complex=True)
    filters = torchaudio.functional.melscale_fbanks(
        201, 0.0, 8000.0, NUM_MELS, 16000, norm="slaney", mel_scale="slaney"
    )
    power = filters.T @ spectrum[..., :-1].abs() ** 2
    logs = power.clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.max() - 8)
    assert (ours - (logs + 4) / 4).abs().max() < 1e-4


def test_sharded_towers_take_a_dummy_of_80_mels(folders, monkeypatch):
    """What a rank without media reads, so that the others do not wait."""
    thinker = qwen.Thinker.from_pretrained(folders / "out/model")
    monkeypatch.setattr(qwen.dist, "is_initialized", lambda: True)
    out = qwen.encode(thinker.model, [], torch.device("cpu"), train_towers=True)
    assert out[-1]["audio"].shape[1] == thinker.config.text_config.hidden_size


# ---- the model's start


def encoded_row(folders, row):
    """A row's prompt, and what the towers of the built model make of its clip."""
    config = MediaConfig(2.0, 12, 64 * 64, 12.0, 4096)
    build = InputBuilder(folders / "out/model", config, folders / "out", audio_captions=False)
    policy = load_policy(folders / "out/model", lora_rank=0, train_towers=False)
    prompt = build(row)
    return build, policy, prompt, policy.with_encoded_media(prompt).media


def test_senses_are_trained_on_what_a_clip_gives(folders):
    """see and hear give the features that the policy gets of a clip, for its frames and its sound."""
    row = read_rows(folders / "out", "train")[0]
    build, policy, prompt, features = encoded_row(folders, row)
    num_seconds = len(row["events"])
    with av.open(str(folders / "out" / row["video"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pictures = torch.from_numpy(np.array(frames[::4])).permute(0, 3, 1, 2)
    with torch.no_grad():
        pictures = senses.shrink(pictures).byte()
        seen = senses.see(policy.thinker.model.visual, build.processor.video_processor, pictures)
    assert seen.shape[0] == num_seconds
    difference = (seen.flatten(0, 1) - features["video"]).norm()
    assert difference < 0.2 * features["video"].norm()  # the resizing is another one

    with av.open(str(folders / "out" / row["video"])) as container:
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    tower, extractor = policy.thinker.model.audio_tower, build.processor.feature_extractor
    sound = sound[: 16000 * num_seconds]
    heard = senses.hear(tower, extractor, [sound])
    assert heard.shape[:2] == (num_seconds, 25)
    with torch.no_grad():
        heard = tower.proj(heard).flatten(0, 1)
    assert (heard - features["audio"]).norm() < 0.1 * features["audio"].norm()


def test_senses_learn_to_name_digits():
    """Of features that differ by their digit, under noise, the projection keeps what tells them apart."""
    torch.manual_seed(0)
    tower = torch.nn.Module()
    tower.proj = torch.nn.Linear(32, 16)
    digits = torch.arange(400) % 10
    features = torch.eye(10)[digits].repeat(1, 4)[:, None, :32] + 0.5 * torch.randn(400, 5, 32)
    halves = features[:200], digits[:200], features[200:], digits[200:]
    assert senses.train_projection(tower, *halves) > 0.9
    shuffled = halves[0], digits[:200][torch.randperm(200)], *halves[2:]
    assert senses.train_projection(tower, *shuffled) < 0.3


def test_varied_pictures_stay_pictures():
    pictures = torch.rand(8, 3, 56, 56, generator=torch.Generator().manual_seed(0)) * 255
    varied = senses.vary(pictures, torch.Generator().manual_seed(1))
    assert varied.shape == pictures.shape
    assert 0 <= varied.min() and varied.max() <= 255
    assert (varied - pictures).abs().mean() > 5
    again = senses.vary(pictures, torch.Generator().manual_seed(1))
    assert torch.equal(varied, again)


def test_text_model_is_the_toys(folders):
    """Layers as they are shipped, embeddings by the token's name: the two vocabularies differ."""
    thinker = qwen.Thinker.from_pretrained(folders / "out/model")
    shipped = load_file(toy.WEIGHTS)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dict(thinker.named_parameters())[name], shipped[name].float())
    toy.make_model(folders / "toy")
    ours = InputBuilder(folders / "out/model", None, folders, audio_captions=False).tokenizer
    toys = InputBuilder(folders / "toy", None, folders, audio_captions=False).tokenizer
    embeds = thinker.get_input_embeddings().weight
    toy_embeds = shipped["model.language_model.embed_tokens.weight"].float()
    for token in ("<|im_end|>", "7", "\u010a"):  # a line's end, as byte-level BPE writes it
        i, j = ours.convert_tokens_to_ids(token), toys.convert_tokens_to_ids(token)
        assert torch.equal(embeds[i], toy_embeds[j]), token


def test_kept_features_are_the_towers(folders, tmp_path, monkeypatch):
    """A second cache reads from the disk what the first one wrote, and decodes nothing."""
    monkeypatch.setattr("experiments.variants.REPOSITORY", tmp_path)
    row = read_rows(folders / "out", "train")[0]
    build, policy, _, features = encoded_row(folders, row)
    first = KeptClips(build, 10**9, policy).get(row)
    monkeypatch.setattr(build, "from_clip", None)  # what decodes
    second = KeptClips(build, 10**9, policy)
    second.prefetch(row)
    again = second.get(row)
    for modality in ("video", "audio"):
        assert torch.equal(again.media[modality], features[modality])
        assert torch.equal(first.media[modality], features[modality])
    assert torch.equal(again.input_ids, first.input_ids)


# ---- the whole way


def test_cold_start_and_two_steps_of_rl(folders, tmp_path):
    out = folders / "out"
    media = ["--max-frames", 12, "--max-audio-seconds", 12, "--save-every", 0]
    rows = Rows(out / "people.jsonl")
    assert len(rows) == 9 and rows[0]["use_audio"]
    sft = ["--model", out / "model", "--data", out / "sft.jsonl", "--out", tmp_path / "sft"]
    launch(
        "train_sft.py",
        *sft,
        "--steps",
        2,
        "--batch-size",
        4,
        "--lr",
        1e-3,
        "--no-train-towers",
        *media,
    )
    before, after = (load_file(f / "model.safetensors") for f in (sft[1], tmp_path / "sft/final"))
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert changed and not any("visual" in name or "audio_tower" in name for name in changed)
    launch(
        "train_rl.py",
        *("--stage", 2, "--model", tmp_path / "sft/final", "--data", out / "train.jsonl"),
        *("--eval-data", out / "people.jsonl", "--eval-samples", 4, "--judge", "toy"),
        *("--steps", 2, "--prompts-per-step", 2, "--max-new-tokens", 16, "--eval-every", 2),
        *("--out", tmp_path / "run", *media),
    )
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 2 and "eval/acc" in json.loads(metrics[-1])
    scoring = ("--model", tmp_path / "run", "--data", out / "people.jsonl", "--max-new-tokens", 16)
    full, muted = tmp_path / "scores/full", tmp_path / "scores/video"
    launch("eval.py", *scoring, *media[:4], "--html", 3, "--out", full)
    flags = ("--without", "sound", "--baseline", full, "--out", muted)
    launch("eval.py", *scoring, *media[:4], *flags)
    assert (tmp_path / "scores/full/items.html").exists()


# ---- bad input


@pytest.mark.parametrize("flag", ["hands", "voices", "ears"])
def test_a_folder_of_another_layout_is_one_line(folders, tmp_path, flag):
    (tmp_path / "empty").mkdir()
    inputs = {name: folders / name for name in ("hands", "voices", "ears")}
    inputs[flag] = tmp_path / "empty"
    words = [word for name, path in inputs.items() for word in (f"--{name}", path)]
    printed = launch(SCRIPT, *words, "--out", tmp_path / "out", code=1)
    assert f"--{flag}" in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_a_speaker_without_all_digits_is_left_out(tmp_path):
    write_voices(tmp_path, ["ann", "bob", "cy"])
    assert len(hands_and_voices.read_voices(tmp_path)) == 3
    (tmp_path / "recordings/4_bob_0.wav").unlink()
    with pytest.raises(UserError, match="--voices"):
        hands_and_voices.read_voices(tmp_path)


def test_ears_that_are_no_whisper(folders, tmp_path):
    with pytest.raises(UserError, match="--ears"):
        ears.read_ears(folders / "out/model")
    (tmp_path / "model.bin").write_bytes(b"\6\0\0\0\5\0LSTM\0")
    with pytest.raises(UserError, match="model.bin"):
        ears.read_ctranslate2(tmp_path / "model.bin")
    audio_config, state = ears.read_ears(folders / "ears")
    thinker = qwen.Thinker.from_pretrained(folders / "out/model")
    del state["conv1.weight"]
    with pytest.raises(UserError, match="--ears"):
        ears.put_ears(thinker.model.audio_tower, state)


def test_broken_recordings_and_photographs_name_their_file(tmp_path):
    path = tmp_path / "3_ann_0.wav"
    path.write_bytes(b"RIFF")
    with pytest.raises(UserError, match="3_ann_0"):
        hands_and_voices.read_recording(path)
    path = tmp_path / "IMG_1.JPG"
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="IMG_1"):
        hands_and_voices.read_photograph(path, 112)
