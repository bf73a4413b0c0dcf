"""
Asks a model about a clip: a video, a sound, images, or a sound beside a video.

    python ask.py clip.mp4 "Which color is shown while the low tone sounds?" --options red green blue
    python ask.py clip.mp4 "What makes the sound?" --model runs/stage3 --samples 8
    python ask.py clip.mp4                                # questions one after another
    python ask.py photo1.jpg photo2.jpg "What has changed?" --json
    python ask.py --data rows.jsonl --out answers.jsonl   # many rows; they need no answers

The last word is the question, unless it is a file. Without a question, lines are read from the
terminal; options follow their question after bars: Which color? | red | green. The clip is decoded,
encoded and read once, and each further question only costs its own tokens.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import re
from pathlib import Path

import toy
from data.media_flags import add_media_flags, check_media_flags, media_config_from
from data.rows import INSTRUCTIONS
from run import arguments
from run.errors import UserError


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.usage = '%(prog)s FILE ... "QUESTION" [--flag value ...]'
    parser.add_argument(
        "words", nargs="*", metavar="FILE ... QUESTION", help="media files, then the question"
    )

    flag = parser.add_argument_group("model").add_argument
    flag("--model", help="folder of a run or model, or hub id; without it the toy")
    arguments.add_device_flags(flag)

    flag = parser.add_argument_group("question").add_argument
    flag("--options", nargs="+", metavar="TEXT", help="the question is a choice among these")
    flag(
        "--answer-type",
        choices=list(INSTRUCTIONS),
        help="type of answer that the prompt asks for; without it choice with --options, else free-form",
    )
    flag("--start", type=float, help="second at which the part of the clip begins")
    flag("--end", type=float, help="second at which it ends")
    flag("--no-audio", action="store_true", help="do not use the sound of a video")
    flag("--system", metavar="FILE", help="system prompt; 'none': the model's own default")

    flag = parser.add_argument_group("answer").add_argument
    flag("--samples", type=int, default=1, metavar="N", help="N answers, with their shares")
    flag(
        "--temperature",
        type=float,
        help="sampling temperature; 0 = greedy; without it 0, or 1 with --samples",
    )
    flag("--max-new-tokens", type=int, default=2048, help="limit of reasoning and answer together")
    flag("--seed", type=int, default=0, help="random seed of sampling")
    flag(
        "--json", action="store_true", help="print each answer as a line of JSON, and nothing else"
    )

    flag = parser.add_argument_group("many rows").add_argument
    flag("--data", metavar="FILE", help="JSONL of rows; their answers may be missing")
    flag("--out", default="answers.jsonl", metavar="FILE", help="JSONL of answers, with --data")
    flag("--resume", action="store_true", help="continue --out where it stopped")
    flag("--batch-size", type=int, default=16, help="rows answered together")
    add_media_flags(parser, keeps_clips=False)

    args, source = arguments.parse(parser, argv, overrides)
    check_media_flags(args)
    arguments.check_bounds(args, samples=1, seed=0, temperature=0, batch_size=1, max_new_tokens=1)
    if bool(args.words) == bool(args.data):
        parser.error("give a file to ask about, or --data with rows")
    if args.temperature is None:
        args.temperature = 0.0 if args.samples == 1 else 1.0
    if args.samples > 1 and args.temperature == 0:
        raise UserError("--samples: greedy answers are all the same: give a --temperature above 0")
    args.files, args.question = split_words(args.words)
    return args, source


def overrides(args):
    """Yields (where they come from, {flag: default}) that depend on other flags."""
    if toy.is_toy(args.model):
        max_new_tokens = toy.OVERRIDES["rl"]["max_new_tokens"]
        yield "toy", toy.OVERRIDES["media"] | dict(max_new_tokens=max_new_tokens, batch_size=64)


def split_words(words):
    """-> the files, and the question: the last word if it is not a file and not the only one."""
    files, question = list(words), None
    is_path = re.fullmatch(r"\S+\.\w{2,4}", words[-1]) if words else False
    if len(files) > 1 and not is_path and not Path(files[-1]).is_file():
        question = files.pop()
    for file in files:
        if not Path(file).is_file():
            kind = "a folder" if Path(file).is_dir() else "no file"
            raise UserError(f"{kind} at {file}: give files, then the question in quotes")
    return files, question


if __name__ == "__main__":
    arguments.answer_early(parse_args)

import contextlib
import json
import sys
import time
from collections import Counter

from tqdm import tqdm

import answers
from data import clips
from data.clips import BadRow
from data.rows import Rows, normalize_row, option_table
from evaluation import items
from evaluation.asking import ClipItems, answer_items
from evaluation.protocol import Protocol, parse_reply, prompt_turns, read_system
from models.clip_prefix import read_prefix
from models.inputs import InputBuilder
from models.loading import load_to_answer
from models.paths import resolve_run_dir
from models.rollout import rollout
from run import processes
from run.io import append_json, write_text
from run.launch import run_main

IMAGE_FORMATS = ("image2", "gif", "webp")  # beside FFmpeg's "png_pipe", "jpeg_pipe", ...


# ---- a clip from files -------------------------------------------------------------------------


def row_of_files(files, *, start, end, no_audio, media_config):
    """Files, of whatever kind each is -> the media of a row, and a note about its sound, or None."""
    row = dict(prompt_id="clip", images=[], start=start, end=end)
    sounds = []
    for file in files:
        kind = kind_of_file(file)
        if kind == "image":
            row["images"].append(file)
        elif kind == "audio":
            sounds.append(file)
        elif "video" in row:
            raise UserError(f"{row['video']} and {file}: give one video at a time")
        else:
            row["video"] = file
    if sounds:
        row["audio"] = sounds if len(sounds) > 1 else sounds[0]

    note = None
    if "video" in row and not sounds and not no_audio:
        row["use_audio"] = items.has_usable_sound(".", row, media_config)
        if not row["use_audio"]:
            limit = f"over --max-audio-seconds {media_config.max_audio_seconds:g}"
            why = f"is {limit}" if has_sound(row["video"]) else "does not exist"
            note = f"no sound is used: that of {row['video']} {why}"
    return row, note


def kind_of_file(path):
    """ "video", "audio" or "image", by the content of a file."""
    with clips.open_media(path, path) as container:
        video = container.streams.best("video")
        is_cover = video and video.disposition & video.disposition.attached_pic
        if video and not is_cover:
            name = container.format.name
            is_image = name.endswith("_pipe") or name in IMAGE_FORMATS
            return "image" if is_image and video.frames <= 1 else "video"
        if container.streams.audio:
            return "audio"
    raise UserError(f"{path} has neither pictures nor sound: give a video, sound or image file")


def has_sound(path):
    with clips.open_media(path, path) as container:
        return bool(container.streams.audio)


def ask_row(media, question, options, answer_type):
    """A question about the media of a row, as a row."""
    if answer_type in ("choice", "multi") and not options:
        raise UserError(f"--answer-type {answer_type} needs --options")
    row = dict(media, question=question, options=options, answer_type=answer_type)
    return normalize_row(row, needs_answer=False)


# ---- answers -----------------------------------------------------------------------------------


def describe_clip(clip):
    """What the model gets of a clip -> dict"""
    sounds = [len(sound) / clips.AUDIO_RATE for sound in clip.sounds]
    description = {}
    if clip.frames is not None:
        count, _, height, width = clip.frames.shape
        description["frames"] = count
        description["frame_size"] = [width, height]
        description["frames_per_second"] = round(clip.fps, 3)
    if clip.images:
        description["images"] = [list(image.shape[:0:-1]) for image in clip.images]
    if sounds:
        description["sound_seconds"] = [round(seconds, 2) for seconds in sounds]
    return description


def clip_line(description, prompt_tokens):
    """The same as a line of text."""
    parts = []
    if "frames" in description:
        width, height = description["frame_size"]
        rate = description["frames_per_second"]
        parts.append(f"{description['frames']} frames of {width} x {height}, {rate:g} a second")
    for width, height in description.get("images", []):
        parts.append(f"an image of {width} x {height}")
    for seconds in description.get("sound_seconds", []):
        parts.append(f"{seconds:g} s of sound")
    return ", ".join([*parts, f"{prompt_tokens} prompt tokens"])


def read_answers(row, texts, completions):
    """
    -> dict: the most frequent answer, its reasoning and whole completion, and all answers with their
    shares. An answer that cannot be read is None.
    """
    protocol = Protocol()
    forms, by_form = [], {}
    for text, completion in zip(texts, completions):
        answer, form = parse_reply("", row, text, completion.truncated, protocol)
        forms.append(form)
        by_form.setdefault(form, (answer, text, completion.truncated))
    counts = Counter(forms)
    best = max(counts, key=lambda form: (form is not None, counts[form]))  # the first of equals
    answer, text, truncated = by_form[best]
    reasoning, _ = answers.split_completion(text)
    result = dict(answer=answer, reasoning=reasoning, completion=text, truncated=truncated)
    if len(texts) > 1:
        shares = []
        for form, count in counts.most_common():
            answer = by_form[form][0] if form is not None else None  # unreadable ones together
            shares.append(dict(answer=answer, count=count, share=count / len(texts)))
        result["answers"] = shares
    return result


def answer_line(row, result):
    """The answer as a line of text; of a choice with the option's text."""
    answer = result["answer"]
    if answer is None:
        return "cut off by --max-new-tokens" if result["truncated"] else "no answer found"
    options = option_table(row["options"])
    letter = answers.normalize_answer(answer, row["answer_type"], row["options"])
    if row["answer_type"] == "choice" and letter in options:
        return f"{letter}. {options[letter]}"
    return answer


class Stream:
    """Prints a completion while it is sampled: `add` gets the next token, (1,)."""

    def __init__(self, builder):
        self.builder, self.ids, self.printed = builder, [], 0
        print(builder.opened_tag, end="")

    def add(self, token):
        self.ids.append(token.item())
        text = self.builder.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter of several tokens
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)


# ---- one clip ----------------------------------------------------------------------------------


class ClipSession:
    """Questions about one clip, which is decoded, encoded and read for the first of them only."""

    def __init__(self, policy, builder, media, protocol):
        self.policy, self.builder, self.media, self.protocol = policy, builder, media, protocol
        self.clip = None  # Clip
        self.first_prompt = None  # Prompt
        self.prefix = None  # ClipPrefix

    def prompt(self, row):
        """-> the Prompt of a question, {part: seconds}"""
        turns = prompt_turns("", row, self.protocol)
        seconds, start = {}, time.perf_counter()
        if self.clip is not None:
            return self.builder.with_text(self.first_prompt, row, turns=turns), seconds
        clip = clips.decode_clip(row, self.builder.root, self.builder.media_config)
        self.first_prompt = self.builder.from_clip(row, clip, turns=turns)
        seconds["decode"], start = time.perf_counter() - start, time.perf_counter()
        length = self.builder.media_length(self.first_prompt)
        self.prefix = read_prefix(self.policy, self.first_prompt, length)
        seconds["read"] = time.perf_counter() - start
        self.clip = clip
        return self.first_prompt, seconds

    def answer(self, prompt, *, num_samples, temperature, max_new_tokens, seed, on_token=None):
        """-> list of Completion"""
        (completions,) = rollout(
            self.policy,
            [prompt],
            [num_samples],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            eos_ids=self.builder.eos_ids,
            seeds=[seed],
            prefix=self.prefix,
            on_token=on_token,
        )
        return completions


def ask_about_files(args, policy, builder, protocol):
    """Answers the question on the command line, or those that come on lines of standard input."""
    media, note = row_of_files(
        args.files,
        start=args.start,
        end=args.end,
        no_audio=args.no_audio,
        media_config=builder.media_config,
    )
    if note and not args.json:
        print(note)
    session = ClipSession(policy, builder, media, protocol)
    if args.question is not None:
        row = ask_row(media, args.question, args.options, args.answer_type)
        answer_one(args, session, row)
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal and not args.json:
        print("Questions about the clip; an empty line ends. Options: Which color? | red | green")
    while True:
        if is_terminal and not args.json:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        # with spaces around the bar: a reserved token such as <|im_end|> must stay whole
        question, *options = re.split(r"\s+\|\s+", line.strip())
        try:
            row = ask_row(session.media, question, options or args.options, args.answer_type)
        except BadRow as problem:
            if not is_terminal:
                raise
            print(problem)
            continue
        answer_one(args, session, row)


def answer_one(args, session, row):
    """Asks one question and prints the answer."""
    is_first = session.clip is None
    start = time.perf_counter()
    prompt, seconds = session.prompt(row)
    description = describe_clip(session.clip)
    num_tokens = len(prompt.input_ids)
    if is_first and not args.json:
        print(f"the model gets {clip_line(description, num_tokens)}")

    on_token = None
    if args.samples == 1 and not args.json:
        on_token = Stream(session.builder).add
    completions = session.answer(
        prompt,
        num_samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=processes.seed(args.seed),
        on_token=on_token,
    )
    seconds["answer"] = time.perf_counter() - start - sum(seconds.values())
    result = read_answers(row, session.builder.texts(completions), completions)
    if args.json:
        result = dict(question=row["question"]) | result
        result["given"] = description | dict(prompt_tokens=num_tokens)
        result["seconds"] = {part: round(value, 3) for part, value in seconds.items()}
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return
    if on_token:
        print()
    for share in result.get("answers", []):
        print(f"{share['share']:6.1%}  {answer_line(row, result | share)}")
    print(f"answer: {answer_line(row, result)}")
    print(", ".join(f"{part} {value:.2f} s" for part, value in seconds.items()))


# ---- many rows ---------------------------------------------------------------------------------


def ask_about_rows(args, policy, builder, protocol, folder):
    """Answers the rows of --data that --out does not hold yet, and appends them to it."""
    out = Path(args.out)
    settings = dict(
        data=args.data,
        model=str(folder),
        samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        system=protocol.system,
        media=media_config_from(args)._asdict(),
    )
    answered_ids = read_answered(out, settings, args.resume)
    rows = Rows(args.data, needs_answer=False)
    pairs = []
    for i in range(len(rows)):
        row = rows[i]
        if row["prompt_id"] not in answered_ids:
            record = items.new_record(args.data, row)
            use_audio = row.get("use_audio") or False
            record["use_audio"] = None if use_audio == "auto" else use_audio
            pairs.append((row, record))

    root = builder.at(rows.path.parent)
    clip_items = [ClipItems("rows", group, root) for group in items.group_by_clip(pairs)]
    answered = answer_items(
        policy,
        clip_items,
        protocol=protocol,
        num_samples=args.samples,
        temperature=args.temperature,
        max_new_tokens={"rows": args.max_new_tokens},
        seed=args.seed,
        batch_size=args.batch_size,
    )
    num_failed = 0
    with tqdm(total=len(rows), initial=len(answered_ids), desc="ask", dynamic_ncols=True) as bar:
        for batch in answered:
            for row, _, completions, problem in batch:
                result = dict(prompt_id=row["prompt_id"], question=row["question"])
                if problem:
                    result |= dict(answer=None, failure=str(problem))
                    num_failed += 1
                    bar.write(f"not answered: {problem}")
                else:
                    result |= read_answers(row, builder.texts(completions), completions)
                append_json(out, result)
            bar.update(len(batch))
    print(f"{out}: {len(pairs) - num_failed} rows answered, {num_failed} failed")


def read_answered(out, settings, resume):
    """-> ids of the rows that OUT holds answers to; those that failed are asked again."""
    settings_file = out.with_name(f"{out.stem}.settings.json")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(settings_file, json.dumps(settings, indent=1))
        return set()
    if not resume:
        raise UserError(f"{out} already exists: add --resume, or choose another --out")
    before = json.loads(settings_file.read_text()) if settings_file.exists() else {}
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise UserError(f"--resume: {out} was made with other {', '.join(changed)}: another --out")

    results = []
    for line in out.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            result = json.loads(line)
        except ValueError:
            if not line.endswith("\n"):  # a killed process cuts the last line
                break
            raise UserError(f"{out} holds a line that is not JSON: remove it") from None
        if "failure" not in result:
            results.append(result)
    write_text(out, "".join(json.dumps(result) + "\n" for result in results))
    return {result["prompt_id"] for result in results}


# ---- the run -----------------------------------------------------------------------------------


def main():
    args, _ = parse_args()
    media_config = media_config_from(args)
    if args.files:
        media_config = media_config._replace(allow_outside=True)  # who typed the path wants it
    # with --json, notices must not stand among the lines of JSON
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        device = processes.init(args.device)
        toy_model = toy.default_model(args.model)
        folder = resolve_run_dir(args.model or toy_model)
        protocol = Protocol(system=read_system(args.system))
        policy = load_to_answer(folder, device, processes.compute_dtype(device, args.dtype))
        builder = InputBuilder(folder, media_config, ".", audio_captions=False)
    if args.data:
        ask_about_rows(args, policy, builder, protocol, folder)
    else:
        ask_about_files(args, policy, builder, protocol)


if __name__ == "__main__":
    run_main(main, BadRow)
