"""
Rows to train on: made of public data or of another trainer's files, checked, and completed with captions
and hints by frozen models.

    python prepare.py rows avqa-train.json --media videos --stage 2 --out music/rows.jsonl --held-out 200
    python prepare.py rows my.csv --out rows.jsonl --map question=Q,answer=A,video=clip
    python prepare.py check rows.jsonl            # decode every row, report each that would not train
    python prepare.py captions --data rows.jsonl --out heard.jsonl --captioner http://localhost:8001/v1 \\
        --captioner-model moonshotai/Kimi-Audio-7B-Instruct
    python prepare.py hints --data heard.jsonl --out hinted.jsonl --teacher http://localhost:8002/v1 \\
        --teacher-model Qwen/Qwen2.5-VL-72B-Instruct

A Hugging Face folder may be given instead of a URL; the model then runs in this process.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse

from data import converters
from data.media_flags import add_media_flags, check_media_flags, media_config_from
from run.arguments import PARSER, answer_early, check_bounds
from run.errors import UserError

OPEN_TYPES = ("auto", "text", "free-form")
SOUND = {"auto": "auto", "true": True, "false": False}  # --use-audio -> a row's use_audio


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help):
        return commands.add_parser(name, help=help, description=help, **PARSER)

    # ---- rows
    rows = command(
        "rows",
        "make rows of public data or of another trainer's files, and report every record left out",
    )
    flag = rows.add_argument
    flag("files", nargs="+", help="JSON, JSONL, CSV, parquet or Arrow; also .gz")
    flag(
        "--out",
        required=True,
        help="JSONL to write; OUT.report.json and OUT.held-out.jsonl stand beside it",
    )
    flag(
        "--from",
        dest="form",
        default="auto",
        choices=["auto", *converters.FORMATS],
        metavar="NAME",
        help="format of the files; auto: by the keys of each record. One of: "
        + ", ".join(converters.FORMATS),
    )
    flag(
        "--map",
        metavar="FIELD=COLUMN,...",
        help="for a format of your own: question=Q,answer=A,video=clip; a column may be nested "
        "(meta.answer), and options may be spread over several columns (options=A+B+C+D)",
    )
    flag("--media", help="folder that media paths are relative to; by default the first file's")
    flag(
        "--stage",
        type=int,
        choices=[0, 1, 2, 3],
        help="the stage the rows are for; it sets --use-audio: false for 0 and 1, else auto",
    )
    flag(
        "--use-audio",
        choices=list(SOUND),
        help="whether a video's own sound is used, where the record does not decide it; auto: if the "
        "file has a sound track (default: as --stage sets it, else auto)",
    )
    flag(
        "--open-type",
        choices=OPEN_TYPES,
        default="auto",
        help="answer_type of answers in words: text scores equality, free-form overlap; auto: "
        f"free-form from {converters.MANY_WORDS} words on",
    )
    flag(
        "--all-turns",
        action="store_true",
        help="a row for each question of a conversation (messages), without the turns before it; else "
        "only for the first. LLaVA's questions stand alone: each makes a row",
    )
    flag(
        "--max-answer-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="largest share of an answer type's rows that may have the same answer; surplus rows are "
        "dropped, chosen by --seed",
    )
    flag(
        "--held-out",
        type=int,
        default=0,
        metavar="N",
        help="move about N rows, by whole clips, to OUT.held-out.jsonl",
    )
    flag(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="keep at most N rows, chosen by --seed; 0 = all",
    )
    flag(
        "--seed",
        type=int,
        default=0,
        help="random seed of wording, wrong options and the choice of rows",
    )
    flag(
        "--exclude-benchmarks",
        metavar="ROOT",
        help="folder with benchmarks, each in a folder of its name: rows about their clips or with "
        "their questions are dropped",
    )
    flag("--against", dest="exclude_benchmarks", help=argparse.SUPPRESS)  # its old name
    flag("--html", type=int, default=0, metavar="N", help="write a page of N rows, OUT.html")
    flag(
        "--check-media",
        action="store_true",
        help="decode every clip: drop broken ones, and set use_audio by their sound tracks",
    )
    flag("--allow-missing", action="store_true", help="keep rows whose media files are missing")
    flag(
        "--max-bad-frac",
        type=float,
        default=0.1,
        help="share of broken records above which nothing is written",
    )
    flag("--force", action="store_true", help="overwrite --out, and its held-out file")
    add_media_flags(rows, keeps_clips=False)

    # ---- the other commands
    check = command("check", "decode every row of a JSONL, and report each that would not train")
    check.add_argument("file", help="JSONL of rows")
    check.add_argument("--model", help="also count prompt tokens with this model's processor")
    add_media_flags(check, keeps_clips=False)
    captions = command("captions", "write audio_caption into every row that has sound (stage 2)")
    add_frozen_model_flags(captions, "captioner")
    hints = command("hints", "write a hint that does not give the answer away into every row")
    add_frozen_model_flags(hints, "teacher")
    hints.add_argument(
        "--attempts",
        type=int,
        default=5,
        help="attempts to get a hint that does not give the answer away",
    )

    args = parser.parse_args(argv)
    check_media_flags(args)
    if args.command in ("captions", "hints"):
        check_bounds(args, concurrency=1, retries=0, timeout=0.001)
    if args.command == "hints":
        check_bounds(args, attempts=1)
    if args.command == "rows":
        check_bounds(args, max_answer_share=(0.01, 1), max_bad_frac=(0, 1), held_out=0, limit=0)
        try:
            args.columns = converters.parse_columns(args.map) if args.map else {}
        except ValueError as problem:
            raise UserError(f"--map: {problem}") from None
        if args.use_audio is None:
            args.use_audio = "false" if args.stage in (0, 1) else "auto"
    return args


def add_frozen_model_flags(parser, role):
    """role   "captioner" or "teacher": the flag that says which model is asked"""
    flag = parser.add_argument
    flag("--data", required=True, help="JSONL of rows")
    flag("--out", required=True, help="JSONL to write, with each row of --data")
    flag(f"--{role}", required=True, help="URL of a chat server (http://host:8000/v1), or a folder")
    flag(f"--{role}-model", help="the model's name on the server")
    flag("--cache-dir", help="folder of the cached replies (default: OUT.answers)")
    flag("--concurrency", type=int, default=16, help="requests at the same time")
    flag("--timeout", type=float, default=300.0, help="seconds for one attempt")
    flag("--retries", type=int, default=4, help="attempts after the first")
    formats = ["images", "video"]
    help = "send the frames as images, or as one video (vLLM only)"
    flag("--frame-format", choices=formats, default="images", help=help)
    flag(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="device of a model given as a folder",
    )
    add_media_flags(parser, keeps_clips=False)
    # old names
    hidden = dict(help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    flag("--answers", dest="cache_dir", **hidden)
    flag("--frames-as", dest="frame_format", choices=formats, **hidden)


if __name__ == "__main__":
    answer_early(parse_args)

import json
import sys
from pathlib import Path

from tqdm import tqdm

from data.clip_cache import num_decoders
from data.clips import BadRow
from data.conversion import Conversion, fingerprint
from data.row_check import check_rows
from data.rows import answer_spec, check_file, question_text
from evaluation import benchmarks
from evaluation.items_page import write_items_page
from models.inputs import InputBuilder
from run import devices
from run.io import write_text
from run.launch import run_main
from teachers.annotate import annotate_rows, write_caption, write_hint
from teachers.client import FrozenModel
from teachers.leaks import hint_leak

# ---- rows --------------------------------------------------------------------------------------


def rows(args):
    out = Path(args.out)
    check_out(out, args.force, args.held_out > 0)
    files = [Path(file) for file in args.files]
    # ---- what a record may become
    context = converters.Context(
        media=args.media or files[0].parent,
        use_audio=SOUND[args.use_audio],
        seed=args.seed,
        open_type=args.open_type,
        columns=args.columns,
        all_turns=args.all_turns,
    )
    conversion = Conversion(out, context, form=None if args.form == "auto" else args.form)
    # where media lie is no matter here: the report says if they lie outside OUT's folder
    media_config = media_config_from(args)._replace(allow_outside=True)
    held = {}
    if args.exclude_benchmarks:
        held = fingerprints_of_benchmarks(args.exclude_benchmarks)

    # ---- records -> rows, then which of them stay; nothing is written if too much is broken
    try:
        conversion.read(files, args.allow_missing, held)
        if args.check_media:
            conversion.check_media(media_config, num_decoders())
        conversion.report.stop_if_useless(conversion.kept.sum(), args.max_bad_frac)
        if args.max_answer_share < 1:
            conversion.drop_common_answers(args.max_answer_share)
        if args.limit:
            conversion.limit(args.limit)
        if args.held_out:
            conversion.hold_out(args.held_out)
        shown = conversion.write(args.held_out > 0, args.html)
    finally:
        conversion.part.unlink(missing_ok=True)
    if not args.held_out and conversion.held_out_path.exists():
        conversion.held_out_path.unlink()  # its rows are now in OUT
        print(f"removed {conversion.held_out_path}: its rows are in {out} now")

    # ---- what became of every record
    report = conversion.as_dict()
    report_path = out.with_name(f"{out.stem}.report.json")
    write_text(report_path, json.dumps(report, indent=1, ensure_ascii=False))
    print_report(report, out)
    print(f"report: {report_path}")
    if args.html:
        page = out.with_suffix(".html")
        records = [as_record(row, out.name) for row in shown]
        roots = {out.name: out.parent}
        write_items_page(page, out.name, records, roots, args.html, media_config)
        print(f"page: {page}")


def check_out(out, force, with_held_out):
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of a JSONL file in it")
    held_out = out.with_name(f"{out.stem}.held-out.jsonl")
    for path in (out, held_out):
        if path.exists() and not force:
            raise UserError(f"{path} exists: add --force to overwrite it, or choose another --out")


def fingerprints_of_benchmarks(root):
    """-> {benchmark: its clips' names, YouTube ids and questions}, of those that lie in the folder."""
    held = {}
    for name in benchmarks.BENCHMARKS:
        if (Path(root) / name).is_dir():
            _, benchmark_rows = benchmarks.load(name, root)
            held[name] = set()
            for row in benchmark_rows:
                held[name] |= fingerprint(row)
    if not held:
        raise UserError(
            f"--exclude-benchmarks: no benchmark in {root}: give each a folder of its name"
        )
    return held


def as_record(row, name):
    """A row as items_page.py shows it: as the model gets it, and what is known of it."""
    keys = ("prompt_id", "video", "audio", "start", "end", "use_audio")
    record = {key: row.get(key) for key in keys}
    reasoning = row.get("reasoning")
    return record | dict(
        file=name,
        images=row.get("images") or [],
        prompt=question_text(row, audio_captions=False),
        truth=row["answer"],
        completion=f"<think>{reasoning}</think>" if reasoning else None,
        score=None,
        failure=None,
        parsed=None,
    )


def print_report(report, out):
    """The report as a table."""
    lines = [("read", report["read"], ""), ("kept", report["kept"], str(out))]
    if report["held_out"]:
        lines.append(("held out", report["held_out"], "by clip"))
    for reason, dropped in report["dropped"].items():
        lines.append((f"dropped: {reason}", dropped["count"], dropped["example"][:60]))
    for reason, changed in report["changed"].items():
        lines.append((f"changed: {reason}", changed["count"], changed["example"][:60]))
    for answer_type, count in report["answer_types"].items():
        lines.append((f"answers: {answer_type}", count, ""))
    if report["use_audio_auto"]:
        sound = "used where the file has a sound track"
        if "silent_videos" in report:
            sound = (
                f"decoded: use_audio is true, but false for {report['silent_videos']} without sound"
            )
        lines.append(("a video's own sound: auto", report["use_audio_auto"], sound))
    if report["clips_in_two_files"]:
        count = report["clips_in_two_files"]
        lines.append(("clips in two of the files", count, "train and test overlap?"))
    width = max(len(name) for name, _, _ in lines)
    for name, count, more in lines:
        print(f"{name:{width}} {count:9}  {more}".rstrip())
    for warning in report["warnings"]:
        print(f"warning: {warning}")


# ---- check -------------------------------------------------------------------------------------


def check(args):
    media_config = media_config_from(args)
    check_file(args.file)
    builder = None
    if args.model:
        root = Path(args.file).parent
        builder = InputBuilder(args.model, media_config, root, audio_captions=True)
        media_config = builder.media_config
    with open(args.file, "rb") as file:
        total = sum(1 for line in file if line.strip())
    num_rows = num_bad = 0
    checks = check_rows(args.file, media_config, builder, num_decoders())
    with tqdm(checks, "rows", total, disable=None) as bar:
        for row_check in bar:
            num_rows += 1
            if row_check.problem:
                num_bad += 1
                bar.write(row_check.problem)
    print(f"{num_rows} rows, {num_bad} would not train")
    sys.exit(1 if num_bad or not num_rows else 0)


# ---- captions and hints ------------------------------------------------------------------------


def open_frozen_model(args, where, model_name):
    check_file(args.data)
    return FrozenModel(
        where,
        model_name=model_name,
        media_folder=Path(args.data).parent,
        media_config=media_config_from(args),
        cache_dir=args.cache_dir or f"{args.out}.answers",
        timeout=args.timeout,
        max_retries=args.retries,
        frames_as=args.frame_format,
        device=devices.choose_device(args.device),
    )


def captions(args):
    model = open_frozen_model(args, args.captioner, args.captioner_model)
    return annotate_rows(
        model,
        args.data,
        args.out,
        field="audio_caption",
        write=lambda row: write_caption(model, row),
        check=lambda row, caption: None,
        concurrency=args.concurrency,
    )


def hints(args):
    model = open_frozen_model(args, args.teacher, args.teacher_model)
    return annotate_rows(
        model,
        args.data,
        args.out,
        field="hint",
        write=lambda row: write_hint(model, row, args.attempts),
        check=lambda row, hint: hint_leak(hint, *answer_spec(row)),
        concurrency=args.concurrency,
    )


def main(argv=None):
    args = parse_args(argv)
    if args.command in ("check", "rows"):
        return dict(check=check, rows=rows)[args.command](args)
    counts = captions(args) if args.command == "captions" else hints(args)
    sys.exit(1 if counts["without"] else 0)


if __name__ == "__main__":
    run_main(main, BadRow)
