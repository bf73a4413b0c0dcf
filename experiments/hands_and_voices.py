"""
Hands and voices: clips in which each second shows a photographed hand and lets a recorded voice say a
digit, questions that need both, and a small model to train on them. docs/hands_and_voices.md

    python -m experiments.hands_and_voices --hands Sign-Language-Digits-Dataset \\
        --voices free-spoken-digit-dataset --ears ears --out hands_and_voices

    OUT/sft.jsonl            rows with a reasoning, for the cold start
    OUT/train.jsonl          rows for RL, of the same people
    OUT/people.jsonl         held out: hands and voices of other people
    OUT/combinations.jsonl   held out: the same people, pairs of shown and said digit that the others lack
    OUT/model/               a small Qwen2.5-Omni thinker: ears from --ears, eyes that name digits
                             (senses.py), the text model of the toy's start

The recordings stay in their own folders and in OUT: none is part of this repository.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
from pathlib import Path

from run import arguments
from run.errors import UserError


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    flag = parser.add_argument
    flag("--hands", required=True, help="clone of ardamavi/Sign-Language-Digits-Dataset")
    flag("--voices", required=True, help="clone of Jakobovski/free-spoken-digit-dataset")
    flag("--ears", help="Hugging Face folder of a Whisper (ears.py); without: random ears")
    flag("--out", required=True, help="folder to write; must be new")
    flag("--seconds", type=int, nargs=2, default=[3, 5], help="length of a clip, least and most")
    flag("--eye-steps", type=int, default=800, help="steps that train the eyes; 0: random eyes")
    flag(
        "--num-sft", type=int, default=1280, help="clips for rows with a reasoning, up to 7 a clip"
    )
    flag("--num-train", type=int, default=128, help="rows for RL")
    flag("--num-test", type=int, default=128, help="rows of each held-out file")
    flag("--seed", type=int, default=0, help="random seed; the same seed writes the same rows")
    args = parser.parse_args(argv)
    arguments.check_bounds(args, num_sft=1, num_train=1, num_test=1, eye_steps=0, seed=0)
    least, most = args.seconds
    if not 2 <= least <= most <= len(ORDINALS):
        raise UserError(f"--seconds {least} {most}: give two numbers from 2 to {len(ORDINALS)}")
    if Path(args.out).exists():
        raise UserError(f"--out {args.out} exists: give another folder")
    return args


ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
)

if __name__ == "__main__":
    arguments.answer_early(parse_args)

import json
import re
import wave
from collections import Counter
from itertools import repeat
from tempfile import TemporaryDirectory
from typing import NamedTuple

import av
import numpy as np
import torch
import torchaudio
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

import toy
from data.clips import MediaConfig
from data.rows import SYSTEM_PROMPT, Rows, completion_text, question_text
from data.thumbnails import encode_picture
from data.toy_clips import VIDEO_FPS, write_mp4
from experiments import ears, senses
from hints import place_hint
from models import qwen, toy_model
from models.inputs import InputBuilder
from models.loading import load_policy
from run.io import temp_dir
from run.launch import run_main

FRAME_SIZE = 112  # pixels, both sides; the model is shown fewer (--max-pixels)
AUDIO_RATE = 16000  # samples/s of the clips
MAX_VOICE = int(0.9 * AUDIO_RATE)  # samples of a recording that fit into its second
DIGITS = range(10)
BLANK_PICTURE = "clips/blank.jpg"  # the picture of a row without a clip
TOLD_PER_CLIP = 9
SHARE_OF_HELD_OUT_HANDS = 0.2
NUM_HELD_OUT_SPEAKERS = 2  # of six, the last by name


# ---- people ------------------------------------------------------------------------------------


class People(NamedTuple):
    hands: list  # of one person each: {digit: path of a photograph}
    voices: list  # of one speaker each: {digit: [paths of recordings]}


def read_hands(folder):
    """
    Dataset/DIGIT/IMG_NUMBER.JPG -> list of {digit: path}, a person each, in the order of the numbers.

    The photographs do not name their person. Each person showed 0 to 9 in turn and the numbers count
    on, so a new person begins where the digit falls. Those who lack a digit are left out.
    """
    photographs = []
    for path in Path(folder).glob("Dataset/[0-9]/*"):
        match = re.search(r"(\d+)\.(jpe?g|png)$", path.name, re.IGNORECASE)
        if match:
            photographs.append((int(match[1]), int(path.parent.name), path))
    photographs.sort()

    people = []
    last_digit = 10  # above every digit: the first photograph begins a person
    for _, digit, path in photographs:
        if digit < last_digit:
            people.append({})
        people[-1][digit] = path  # of a digit that was photographed twice the later picture
        last_digit = digit
    people = [person for person in people if len(person) == len(DIGITS)]
    if len(people) < 2:
        raise UserError(
            f"--hands {folder}: found {len(people)} people with photographs of all ten digits in "
            "Dataset/0 ... Dataset/9, two are needed"
        )
    return people


def read_voices(folder):
    """recordings/DIGIT_SPEAKER_INDEX.wav -> list of {digit: [paths]}, a speaker each, by name"""
    speakers = {}
    for path in sorted(Path(folder).glob("recordings/*.wav")):
        match = re.fullmatch(r"(\d)_(\w+)_(\d+)", path.stem)
        if match:
            digits = speakers.setdefault(match[2], {digit: [] for digit in DIGITS})
            digits[int(match[1])].append(path)
    complete = [speakers[name] for name in sorted(speakers) if all(speakers[name].values())]
    if len(complete) <= NUM_HELD_OUT_SPEAKERS:
        raise UserError(
            f"--voices {folder}: found {len(complete)} speakers with recordings of all ten digits in "
            f"recordings/DIGIT_SPEAKER_INDEX.wav, {NUM_HELD_OUT_SPEAKERS + 1} are needed"
        )
    return complete


def split_people(hands, voices):
    """-> (People to train on, People held out): no person is in both."""
    num_held_out = max(1, round(SHARE_OF_HELD_OUT_HANDS * len(hands)))
    train_people = People(hands[:-num_held_out], voices[:-NUM_HELD_OUT_SPEAKERS])
    held_out_people = People(hands[-num_held_out:], voices[-NUM_HELD_OUT_SPEAKERS:])
    return train_people, held_out_people


# ---- pairs of a shown and a said digit -----------------------------------------------------------


def is_held_out_pair(pair):
    """Ten of the hundred pairs, each digit shown in one and said in one; none where both agree."""
    shown, said = pair
    return (shown + 3 * said) % 10 == 7


PAIRS = [(shown, said) for shown in DIGITS for said in DIGITS]
TRAIN_PAIRS = [pair for pair in PAIRS if not is_held_out_pair(pair)]
HELD_OUT_PAIRS = [pair for pair in PAIRS if is_held_out_pair(pair)]


def random_pairs(rng, num_seconds, pairs, num_agreeing=None):
    """-> list of num_seconds (shown, said); num_agreeing of them equal, None: as chance has it"""
    if num_agreeing is None:
        return [pairs[i] for i in rng.integers(len(pairs), size=num_seconds)]
    agreeing = [pair for pair in pairs if pair[0] == pair[1]]
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    seconds = [differing[i] for i in rng.integers(len(differing), size=num_seconds)]
    for k in rng.choice(num_seconds, num_agreeing, replace=False):
        seconds[k] = agreeing[rng.integers(len(agreeing))]
    return seconds


# ---- questions -----------------------------------------------------------------------------------


class Question(NamedTuple):
    fields: dict  # of the row: question, answer, answer_type, options, hint
    look: list  # the seconds that decide; empty: all
    notes: list  # what its reasoning notes after each second; ends with the answer so far


def known_from(k, answer, num_seconds):
    """Answers so far of a question that second k decides."""
    return ["open"] * k + [answer] * (num_seconds - k)


def compared(digits, others, answers):
    """
    Notes that compare two digits each second. A small model learns a difference, which is linear in
    both, long before it learns whether two digits are equal.
    """
    return [f"off {a - b}, {answer}" for a, b, answer in zip(digits, others, answers)]


def choice(rng, answer, others):
    """-> answer and three other digits as options, in random order; digits of the clip come first"""
    # a digit that the clip does not have would be ruled out without knowing when it comes
    wrong = [digit for digit in DIGITS if digit != answer]
    in_clip = [digit for digit in wrong if digit in others]
    rng.shuffle(wrong)
    rng.shuffle(in_clip)
    options = list(dict.fromkeys([answer, *in_clip, *wrong]))[:4]
    return [str(option) for option in rng.permutation(options)]


def ask_said_while(rng, seconds, k):
    shown, said = seconds[k]
    all_shown, all_said = zip(*seconds)
    if all_shown.count(shown) > 1:
        return None
    fields = {
        "question": f"Which digit is said while the hand shows {shown}?",
        "options": choice(rng, said, all_said),
        "answer": str(said),
        "answer_type": "choice",
        "hint": f"find the second in which the hand shows {shown}, listen there",
    }
    answers = known_from(k, str(said), len(seconds))
    return Question(fields, [k], compared(all_shown, repeat(shown), answers))


def ask_shown_while(rng, seconds, k):
    shown, said = seconds[k]
    all_said = [pair[1] for pair in seconds]
    if all_said.count(said) > 1:
        return None
    fields = {
        "question": f"Which digit does the hand show while the voice says {said}?",
        "answer": str(shown),
        "answer_type": "number",
        "hint": f"find the second in which the voice says {said}, look there",
    }
    answers = known_from(k, str(shown), len(seconds))
    return Question(fields, [k], compared(all_said, repeat(said), answers))


def ask_shown_before(rng, seconds, k):
    said = seconds[k][1]
    all_shown, all_said = zip(*seconds)
    if k == 0 or all_said.count(said) > 1:
        return None
    shown = seconds[k - 1][0]
    fields = {
        "question": f"Which digit did the hand show right before the voice said {said}?",
        "options": choice(rng, shown, all_shown),
        "answer": str(shown),
        "answer_type": "choice",
        "hint": f"find the second in which the voice says {said}, look one second earlier",
    }
    answers = known_from(k, str(shown), len(seconds))
    return Question(fields, [k - 1, k], compared(all_said, repeat(said), answers))


def ask_sum(rng, seconds, k):
    shown, said = seconds[k]
    fields = {
        "question": f"What is the sum of the shown and the said digit in the {ORDINALS[k]} second?",
        "answer": str(shown + said),
        "answer_type": "number",
        "hint": f"add both digits of the {ORDINALS[k]} second",
    }
    return Question(fields, [k], known_from(k, fields["answer"], len(seconds)))


def ask_agree_count(seconds):
    counts = np.cumsum([shown == said for shown, said in seconds])
    fields = {
        "question": "How often do hand and voice agree?",
        "answer": str(counts[-1]),
        "answer_type": "number",
        "hint": "write a line for each second, then count the lines with equal digits",
    }
    return Question(fields, [], compared(*zip(*seconds), counts))


def ask_agree_second(seconds):
    agreeing = [k for k, (shown, said) in enumerate(seconds) if shown == said]
    fields = {
        "question": "In which second do hand and voice agree?",
        "answer": ORDINALS[agreeing[0]],
        "answer_type": "text",
        "hint": "write a line for each second, find the one with equal digits",
    }
    answers = known_from(agreeing[0], fields["answer"], len(seconds))
    return Question(fields, agreeing, compared(*zip(*seconds), answers))


def ask_ever_agree(seconds):
    agreeing = [k for k, (shown, said) in enumerate(seconds) if shown == said]
    fields = {
        "question": "Do hand and voice ever agree?",
        "answer": "yes" if agreeing else "no",
        "answer_type": "yesno",
        "hint": "write a line for each second, look for equal digits",
    }
    first_agreeing = agreeing[0] if agreeing else len(seconds)
    answers = ["no"] * first_agreeing + ["yes"] * (len(seconds) - first_agreeing)
    return Question(fields, agreeing, compared(*zip(*seconds), answers))


# about one second, which may have a pair that is held out; and about the agreement in a whole clip
ONE_SECOND = {
    "said while": ask_said_while,
    "shown while": ask_shown_while,
    "shown before": ask_shown_before,
    "sum": ask_sum,
}
# number of agreeing seconds: drawn first, so that no answer is much more frequent than another
AGREEMENT = {"agree count": (0, 1, 2, 3), "agree second": (1,), "ever agree": (0, 1)}
KINDS = [*ONE_SECOND, *AGREEMENT]
KINDS_OF_A_PAIR = ["said while", "shown while", "sum"]  # answered by both digits of one second


def ask(rng, kind, seconds):
    """-> Question of this kind about a clip, or None if it has no clear answer"""
    if kind in ONE_SECOND:
        return ONE_SECOND[kind](rng, seconds, int(rng.integers(len(seconds))))
    if kind == "agree count":
        return ask_agree_count(seconds)
    if kind == "ever agree":
        return ask_ever_agree(seconds)
    num_agreeing = sum(shown == said for shown, said in seconds)
    return ask_agree_second(seconds) if num_agreeing == 1 else None


def make_question(rng, kind, num_seconds, pairs):
    """-> (seconds, Question), or None if this clip has no clear answer"""
    num_agreeing = None
    if kind in AGREEMENT:
        num_agreeing = min(int(rng.choice(AGREEMENT[kind])), num_seconds)
    seconds = random_pairs(rng, num_seconds, pairs, num_agreeing)
    question = ask(rng, kind, seconds)
    return None if question is None else (seconds, question)


def make_held_out_question(rng, kind, num_seconds):
    """The same about a second whose pair is held out; the other seconds have any pair."""
    seconds = random_pairs(rng, num_seconds, PAIRS)
    k = int(rng.integers(num_seconds))
    seconds[k] = HELD_OUT_PAIRS[rng.integers(len(HELD_OUT_PAIRS))]
    question = ONE_SECOND[kind](rng, seconds, k)
    return None if question is None else (seconds, question)


# ---- rows ----------------------------------------------------------------------------------------


def describe(pair):
    shown, said = pair
    return f"hand {shown}, voice {said}"


# styles of the reasonings that the cold start learns, and their shares: as scraped ones are, some
# look at every second, some at those that decide, and some jump to an answer, which may be wrong
STYLES = {"full": 0.6, "short": 0.1, "hasty": 0.3}


def add_reasoning(rng, row, seconds, question, styles=STYLES):
    """Adds a reasoning, and in its hasty style a guessed answer."""
    has_hint = rng.random() < 0.2  # so that the cold-started policy knows what a hint is for
    style = "full" if has_hint else str(rng.choice(list(styles), p=list(styles.values())))
    if not has_hint:
        del row["hint"]
    if style == "hasty":
        row["answer"] = guess(rng, row, len(seconds))
        row["reasoning"] = f"it seems {row['answer']}"
        return
    lines = [
        f"{k + 1}: {describe(pair)}; {note}"
        for k, (pair, note) in enumerate(zip(seconds, question.notes))
    ]
    if style == "short" and question.look:
        lines = [lines[k] for k in question.look]
    row["reasoning"] = "\n".join([*lines, f"so {row['answer']}"])


def guess(rng, row, num_seconds):
    if row["answer_type"] == "choice":
        return str(rng.choice(row["options"]))
    if row["answer_type"] == "yesno":
        return str(rng.choice(["yes", "no"]))
    if row["answer_type"] == "text":
        return ORDINALS[rng.integers(num_seconds)]
    return str(rng.integers(10))


def make_clip(rng, split, i, seconds_range):
    """-> kind of question, its Question, the seconds of the clip; the kinds take turns"""
    num_seconds = int(rng.integers(seconds_range[0], seconds_range[1] + 1))
    kinds = KINDS_OF_A_PAIR if split == "combinations" else KINDS
    kind = kinds[i % len(kinds)]
    clip = None
    while clip is None:  # until a clip has a clear answer
        if split == "combinations":
            clip = make_held_out_question(rng, kind, num_seconds)
        else:
            clip = make_question(rng, kind, num_seconds, TRAIN_PAIRS)
    seconds, question = clip
    return kind, question, seconds


def row_of(prompt_id, kind, question, seconds, media):
    return {
        "prompt_id": prompt_id,
        **question.fields,
        **media,
        "events": [describe(pair) for pair in seconds],  # what the judge of --judge toy knows
        "note_after": ";",
        "kind": kind,
    }


def make_rows(rng, split, i, seconds_range):
    """
    -> the rows of a clip, its seconds

    A clip has one row, but in sft.jsonl one of each kind: who sees a clip with one answer only learns
    that answer by heart.
    """
    kind, question, seconds = make_clip(rng, split, i, seconds_range)
    questions = {kind: question}
    if split == "sft":
        for other in rng.permutation([other for other in KINDS if other != kind]):
            another = ask(rng, str(other), seconds)
            if another is not None:
                questions[str(other)] = another

    name = f"{split}-{i:05d}"
    rows = []
    for kind, question in questions.items():
        prompt_id = f"hands-{name}" if split != "sft" else f"hands-{name}-{len(rows)}"
        media = {"video": f"clips/{name}.mp4", "use_audio": True}
        row = row_of(prompt_id, kind, question, seconds, media)
        if split == "sft":
            add_reasoning(rng, row, seconds, question)
        rows.append(row)
    return rows, seconds


def make_told_row(rng, i, seconds_range):
    """-> a row of the cold start without a clip: the question says what happens in each second"""
    kind, question, seconds = make_clip(rng, "sft", i, seconds_range)
    row = row_of(f"hands-told-{i:05d}", kind, question, seconds, {"images": [BLANK_PICTURE]})
    add_reasoning(rng, row, seconds, question, styles={"full": 1.0})
    row["question"] = f"A clip: {'. '.join(row['events'])}. {row['question']}"
    return row


def best_blind_guess(rows):
    """Share of rows that the most frequent answer to each kind of question solves, without the clip."""
    solved = 0.0
    for kind in {row["kind"] for row in rows}:
        of_kind = [row for row in rows if row["kind"] == kind]
        if "options" in of_kind[0]:
            solved += len(of_kind) / len(of_kind[0]["options"])
        else:
            ((_, count),) = Counter(row["answer"] for row in of_kind).most_common(1)
            solved += count
    return solved / len(rows)


# ---- clips ---------------------------------------------------------------------------------------


def read_photograph(path, size):
    """-> (size, size, 3) uint8"""
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            return frame.reformat(size, size, "rgb24").to_ndarray()
    except (av.error.FFmpegError, StopIteration) as error:
        raise UserError(f"{path}: this photograph cannot be read ({error})") from None


def read_recording(path):
    """-> (n,) float32 at AUDIO_RATE, its largest value .5, no longer than fits into a second"""
    try:
        with wave.open(str(path)) as file:
            rate, width = file.getframerate(), file.getsampwidth()
            data = file.readframes(file.getnframes())
            num_channels = file.getnchannels()
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path}: this recording cannot be read ({error})") from None
    if width != 2 or num_channels != 1 or not data:
        raise UserError(f"{path}: a mono wav file of 16 bits is needed")
    samples = np.frombuffer(data, np.int16).astype(np.float32)
    samples *= 0.5 / max(np.abs(samples).max(), 1)
    samples = torchaudio.functional.resample(torch.from_numpy(samples), rate, AUDIO_RATE)
    return samples[:MAX_VOICE].numpy()


def say(voice, digits, rng):
    """-> (n AUDIO_RATE,) samples, a digit each second; where in its second it is said is random"""
    # silence in no recording is perfect: a mel of exact zeros would mark the gaps
    audio = rng.normal(0, 0.003, (len(digits), AUDIO_RATE))
    for second, digit in zip(audio, digits):
        recordings = voice[digit]
        samples = read_recording(recordings[rng.integers(len(recordings))])
        start = rng.integers(AUDIO_RATE - len(samples) + 1)
        second[start : start + len(samples)] += samples
    return audio.ravel()


def write_clip(path, seconds, people, rng):
    """One person's hand and one person's voice."""
    hand = people.hands[rng.integers(len(people.hands))]
    voice = people.voices[rng.integers(len(people.voices))]
    frames = []
    for shown, _ in seconds:
        frames += [read_photograph(hand[shown], FRAME_SIZE)] * VIDEO_FPS
    audio = say(voice, [said for _, said in seconds], rng)
    write_mp4(path, frames, FRAME_SIZE, audio, AUDIO_RATE)


def write_split(folder, split, num_clips, people, seconds_range, seed):
    """
    Writes folder/SPLIT.jsonl and its clips -> the rows

    The cold start also gets TOLD_PER_CLIP rows without a clip for each clip. They cost nothing, and teach
    how an answer follows from what happens: the clips are too few for that.
    """
    splits = ["sft", "train", "people", "combinations"]
    rng = np.random.default_rng([seed, splits.index(split)])
    # a generator for each file: the number of clips in one does not change another
    rows = []
    for i in tqdm(range(num_clips), desc=f"{split} clips", disable=None, leave=False):
        clip_rows, seconds = make_rows(rng, split, i, seconds_range)
        write_clip(folder / clip_rows[0]["video"], seconds, people, rng)
        rows += clip_rows
    if split == "sft":
        blank = torch.zeros(3, FRAME_SIZE, FRAME_SIZE, dtype=torch.uint8)
        (folder / BLANK_PICTURE).write_bytes(encode_picture(blank))
        rows += [make_told_row(rng, i, seconds_range) for i in range(TOLD_PER_CLIP * num_clips)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text)
    return rows


# ---- the model -----------------------------------------------------------------------------------


def corpus():
    """Texts with every word that the rows use, for the tokenizer: the same for clips of any length."""
    rng = np.random.default_rng(0)
    for i in range(3000):
        rows, _ = make_rows(rng, "sft", i, (6, len(ORDINALS)))
        row = rows[i % len(rows)]
        question = question_text(row, False)
        if "hint" in row:
            question = place_hint(question, row["hint"])
        yield f"system\n{SYSTEM_PROMPT}user\n{question}assistant\n{completion_text(row)}"


def start_text(thinker, tokenizer):
    """
    The text model of the toy's start, which can already go through a clip second by second. Tokens
    that the toy's tokenizer lacks keep their random rows.
    """
    with safe_open(toy.WEIGHTS, "pt") as file:
        toy_vocab = Tokenizer.from_str(file.metadata()["tokenizer"]).get_vocab()
    weights = {name: weight.float() for name, weight in load_file(toy.WEIGHTS).items()}
    vocab = tokenizer.get_vocab()
    known = [token for token in vocab if token in toy_vocab]
    ids = [vocab[token] for token in known]
    toy_ids = [toy_vocab[token] for token in known]
    with torch.no_grad():
        for name, param in thinker.named_parameters():
            if name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
                param[ids] = weights[name][toy_ids]
            elif name.startswith("model.language_model."):
                param.copy_(weights[name])


def photographs(hands):
    """-> (people, 10, 3, FRAME_SIZE, FRAME_SIZE) uint8"""
    pictures = [[read_photograph(hand[digit], FRAME_SIZE) for digit in DIGITS] for hand in hands]
    return torch.from_numpy(np.array(pictures)).permute(0, 1, 4, 2, 3)


def sounds_of(voices):
    """SOUNDS_PER_VOICE sounds of each voice, digits at random -> list of samples, (all seconds,) digits"""
    rng = np.random.default_rng(0)
    sounds, digits = [], []
    for voice in voices:
        for _ in range(senses.SOUNDS_PER_VOICE):
            said = rng.integers(10, size=senses.SECONDS_HEARD)
            sounds.append(say(voice, said, rng))
            digits.extend(said.tolist())
    return sounds, torch.tensor(digits)


def train_senses(thinker, processor, train_people, held_out_people, has_ears, eye_steps):
    """Eyes from random weights, and the projection of given ears; random ears are left to SFT."""
    if eye_steps:
        share = senses.train_eyes(
            thinker.model.visual,
            processor.video_processor,
            photographs(train_people.hands),
            photographs(held_out_people.hands),
            eye_steps,
        )
        print(f"eyes: name {share:.3f} of the photographs of held-out people")
    if has_ears:
        features = []  # and digits: of the voices to train on, of the others
        for people in (train_people, held_out_people):
            sounds, digits = sounds_of(people.voices)
            tower = thinker.model.audio_tower
            features += [senses.hear(tower, processor.feature_extractor, sounds), digits]
        share = senses.train_projection(tower, *features)
        print(f"ears: name {share:.3f} of the digits that held-out voices say")


def toy_features():
    """-> {modality: (n, D)}: what the toy's own towers make of four of its clips"""
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        toy.make_model(folder / "model")
        toy.make_rows(folder / "stage2", 2, num_train=4, num_test=1)
        config = MediaConfig(2.0, 16, 64 * 64, 8.0, 4096)
        build = InputBuilder(folder / "model", config, folder / "stage2", audio_captions=False)
        policy = load_policy(folder / "model", lora_rank=0, train_towers=False)
        media = [
            policy.with_encoded_media(build(row)).media
            for row in Rows(folder / "stage2/train.jsonl")
        ]
    return {name: torch.cat([one[name] for one in media]) for name in ("video", "audio")}


@torch.no_grad()
def match_senses(thinker, processor, people):
    """The towers' features get the mean and the spread that the toy's text model knows."""
    wanted = toy_features()
    tower = thinker.model.visual
    pictures = photographs(people.hands[:20]).flatten(0, 1)
    seen = senses.see(tower, processor.video_processor, senses.shrink(pictures).byte())
    senses.match(tower.merger.mlp[-1], seen.flatten(0, 1), wanted["video"])
    tower = thinker.model.audio_tower
    sounds, _ = sounds_of(people.voices[:1])
    heard = tower.proj(senses.hear(tower, processor.feature_extractor, sounds))
    senses.match(tower.proj, heard.flatten(0, 1), wanted["audio"])


def write_model(folder, ears_folder, train_people, held_out_people, eye_steps):
    """
    The toy's architecture and text model. With ears_folder its audio tower is that Whisper. The eyes
    and the ears' projection are trained by senses.py.
    """
    tokenizer_json = toy_model.make_tokenizer_json(corpus(), vocab_size=640)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=toy_model.SPECIAL_TOKENS,
    )
    config = toy_model.build_config(tokenizer)
    processor = toy_model.build_processor(tokenizer)
    torch.manual_seed(0)
    # the toy's ears have 128 mels and width 128; Whisper's number of mels is needed in both the
    # tower and the processor
    if ears_folder:
        audio_config, state = ears.read_ears(ears_folder)
        for name, value in audio_config.items():
            setattr(config.audio_config, name, value)
        processor.feature_extractor = WhisperFeatureExtractor(
            feature_size=audio_config["num_mel_bins"], return_attention_mask=True
        )
    thinker = qwen.Thinker(config)
    start_text(thinker, tokenizer)
    if ears_folder:
        ears.put_ears(thinker.model.audio_tower, state)
    has_ears = bool(ears_folder)
    train_senses(thinker, processor, train_people, held_out_people, has_ears, eye_steps)
    match_senses(thinker, processor, train_people)
    thinker.save_pretrained(folder)
    processor.save_pretrained(folder)


def main():
    args = parse_args()
    train_people, held_out_people = split_people(read_hands(args.hands), read_voices(args.voices))
    print(
        f"people: {len(train_people.hands)} hands and {len(train_people.voices)} voices, "
        f"held out {len(held_out_people.hands)} and {len(held_out_people.voices)}"
    )
    if not args.ears:
        print("no --ears: the audio tower is random and has to be trained")
    part = temp_dir(Path(args.out))
    (part / "clips").mkdir()
    write_model(
        part / "model",
        args.ears,
        train_people,
        held_out_people,
        args.eye_steps,
    )
    for split, num_clips, people in (
        ("sft", args.num_sft, train_people),
        ("train", args.num_train, train_people),
        ("people", args.num_test, held_out_people),
        ("combinations", args.num_test, train_people),
    ):
        rows = write_split(part, split, num_clips, people, args.seconds, args.seed)
        line = f"{split}.jsonl: {len(rows)} rows"
        if split != "sft":
            line += f", the best guess without the clip solves {best_blind_guess(rows):.2f}"
        print(line)
    part.rename(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
