"""
Rows made ready to train on: made of public data or of another trainer's files, checked, and given what the
frozen models know of them.

    python prepare.py rows avqa-train.json --media videos --stage 2 --out music/rows.jsonl --held-out 200
    python prepare.py check rows.jsonl            # decode every row, report each that would not train
    python prepare.py captions --data rows.jsonl --out heard.jsonl --captioner http://localhost:8001/v1 \\
        --captioner-model moonshotai/Kimi-Audio-7B-Instruct
    python prepare.py hints --data heard.jsonl --out hinted.jsonl --teacher http://localhost:8002/v1 \\
        --teacher-model Qwen/Qwen2.5-VL-72B-Instruct

In the place of a URL a Hugging Face folder may stand: then the model is asked in this process.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse

from data import converters
from data.media_flags import add_media_flags, media_config_from
from run.arguments import PARSER, answer_early
from teachers import annotate


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, told):
        return commands.add_parser(name, help=told, description=told, **PARSER)

    rows = command(
        "rows",
        "public data, or another trainer's files, as rows, with a report of every one left out",
    )
    flag = rows.add_argument
    flag("files", nargs="+", help="JSON, JSONL, CSV or parquet")
    flag(
        "--out",
        required=True,
        help="JSONL to write; beside it OUT.report.json and OUT.held-out.jsonl",
    )
    flag(
        "--from",
        dest="form",
        default="auto",
        choices=["auto", *converters.FORMATS],
        metavar="NAME",
        help=f"auto: told by the keys of a record; {', '.join(converters.FORMATS)}",
    )
    flag("--media", help="folder that media paths are relative to (default: the first file's)")
    flag("--stage", type=int, choices=[1, 2, 3], help="from 2 on a video's own sound is heard")
    flag("--held-out", type=int, default=0, metavar="N", help="about N rows apart, by clip")
    flag(
        "--limit", type=int, default=0, metavar="N", help="N rows at most, chosen by --seed; 0: all"
    )
    flag("--seed", type=int, default=0, help="of wording, wrong options, choices")
    flag(
        "--against",
        metavar="ROOT",
        help="benchmarks, each in a folder of its name: what is theirs is dropped",
    )
    flag("--html", type=int, default=0, metavar="N", help="N rows to look at, in OUT.html")
    flag("--check-media", action="store_true", help="decode every clip")
    flag("--allow-missing", action="store_true", help="keep rows whose media are not there")
    flag(
        "--max-bad-frac", type=float, default=0.1, help="share of broken rows, above which it fails"
    )
    flag("--force", action="store_true", help="write over what --out holds")
    add_media_flags(rows, keeps_clips=False)
    check = command("check", "decode every row of a JSONL, report each that would not train")
    check.add_argument("file", help="JSONL of rows")
    check.add_argument("--model", help="also count prompt tokens with this model's processor")
    add_media_flags(check, keeps_clips=False)
    captions = command("captions", "write audio_caption into every row that has sound (stage 2)")
    annotate.add_flags(captions, "captioner")
    hints = command("hints", "write a hint into every row, one that does not give the answer away")
    annotate.add_flags(hints, "teacher")
    told = "replies a row, until one is no leak"
    hints.add_argument("--attempts", type=int, default=5, help=told)
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer_early(parse_args)

import hashlib
import json
import os
import re
import sys
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import readers
from data.clip_cache import num_decoders
from data.clips import BadRow, decode_clip
from data.rows import (
    answer_spec,
    check_file,
    clip_of,
    media_paths,
    normalize_row,
    parse_line,
    question_text,
    row_id,
)
from evaluation import benchmarks
from evaluation.items_page import write_items_page
from models.inputs import InputBuilder
from run.errors import UserError
from run.io import write_text
from run.launch import run_main
from teachers.leaks import hint_leak

# ---- rows --------------------------------------------------------------------------------------

BAD = ("unreadable", "not as published", "breaks the format", "media missing", "media broken")


class Report:
    """What became of every row that was read: read = kept + held out + all that was dropped."""

    def __init__(self):
        self.read, self.dropped, self.examples, self.kinds = 0, Counter(), {}, Counter()

    def drop(self, reason, example):
        self.dropped[reason] += 1
        self.examples.setdefault(reason, str(example)[:200])

    def as_dict(self, **more):
        dropped = {
            k: dict(count=n, example=self.examples[k]) for k, n in self.dropped.most_common()
        }
        return dict(
            read=self.read, **more, dropped=dropped, answer_types=dict(self.kinds.most_common())
        )


def digest(*words):
    """A number that is the same in every process."""
    return int.from_bytes(
        hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "big", signed=True
    )


def converted(args, report):
    """Yields the rows of all files; what is left out is counted in the report, by its reason."""
    media = Path(args.media or Path(args.files[0]).parent)
    context = converters.Context(media, args.stage, args.seed)
    for file in map(Path, args.files):
        check_file(file)
        first = next((r for r in readers.records(file) if isinstance(r, dict)), {})
        if form_of(args, first) in converters.INDEXED:
            for record in filter(lambda r: isinstance(r, dict), readers.records(file)):
                converters.index(form_of(args, record), record, context)
        for number, record in enumerate(
            tqdm(readers.records(file), file.name, unit=" rows", disable=None)
        ):
            made = 0
            try:
                if isinstance(record, BadRow):
                    raise converters.Dropped("unreadable", record)
                record = unpacked(record, Path(args.out).parent / "media")
                name = form_of(args, record) or converters.format_of(record)
                for row in converters.FORMATS[name][1](record, context):
                    report.read, made = report.read + 1, made + 1
                    row["prompt_id"] = str(row.get("prompt_id") or f"{file.stem}-{number}")
                    yield file, media, row
            except converters.Dropped as left_out:
                report.read += 1
                report.drop(left_out.args[0], f"{file.name}, record {number}: {left_out.args[-1]}")
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                report.read += not made
                told = f"{file.name}, record {number}: {type(error).__name__} {error}"
                report.drop("not as published", told)


def unpacked(value, folder):
    """A record whose media are in it, as {"bytes", "path"}: each is written to the folder, by its hash."""
    if isinstance(value, list):
        return [unpacked(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    if not isinstance(content := value.get("bytes"), bytes):
        return {key: unpacked(item, folder) for key, item in value.items()}
    name = (
        hashlib.blake2b(content, digest_size=12).hexdigest() + Path(str(value.get("path"))).suffix
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        (folder / f"{name}.part").write_bytes(content)
        os.replace(folder / f"{name}.part", folder / name)
    return str((folder / name).resolve())


def form_of(args, record):
    """The name of a record's format; None if nothing tells it."""
    try:
        return args.form if args.form != "auto" else converters.format_of(record)
    except converters.Dropped:
        return None


def placed(row, media, folder, allow_missing):
    """The row with its media paths as seen from the folder of the output; one that is not there is told."""

    def seen(path):
        whole = media / str(path)
        if not allow_missing and not whole.is_file():
            raise FileNotFoundError(f"{row['prompt_id']}: no file at {whole}")
        return Path(os.path.relpath(whole, folder)).as_posix()

    for kind in ("video", "audio", "images"):
        if paths := row.get(kind):
            row[kind] = [seen(p) for p in paths] if isinstance(paths, list) else seen(paths)
    return row


def theirs(root):
    """-> {benchmark: its clips' names, YouTube ids and questions}, of those that lie in the folder."""
    found = {}
    for name in benchmarks.BENCHMARKS:
        if (Path(root) / name).is_dir():
            _, rows = benchmarks.load(name, root)
            found[name] = set().union(*(marks(row) for row in rows))
    if not found:
        raise UserError(f"--against: no benchmark lies in {root}: give each a folder of its name")
    return found


def marks(row):
    """What tells that a row is of a benchmark: names of its clips, YouTube ids in them, its question."""
    stems = {Path(str(path)).stem for path in media_paths(row)}
    ids = {found[0] for stem in stems if (found := re.match(r"[\w-]{11}(?=_\d|_video|$)", stem))}
    question = " ".join(str(row.get("question")).lower().split())
    return stems | ids | {question}


def rows(args):
    out, report, clips, kept = Path(args.out), Report(), array("q"), array("q")
    if out.exists() and not args.force:
        raise UserError(f"{out} is there: add --force to write over it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    known = theirs(args.against) if args.against else {}
    seen, ids, files_of, part = set(), set(), {}, out.with_name(out.name + ".part")
    two_files = set()
    try:
        with open(part, "w", encoding="utf-8") as file:
            for source, media, row in converted(args, report):
                try:
                    row = placed(row, media, out.parent, args.allow_missing)
                    row = {k: v for k, v in normalize_row(row).items() if v not in (None, [], "")}
                except FileNotFoundError as problem:
                    report.drop("media missing", problem)
                    continue
                except BadRow as problem:
                    report.drop("breaks the format", problem)
                    continue
                clip, text = digest(*clip_of(row)[:-2]), (row["question"], row["answer"])
                if (same := digest(clip, *text)) in seen:
                    report.drop("the same question about the same clip", row["prompt_id"])
                    continue
                seen.add(same)
                if benchmark := next(
                    (n for n, all_of in known.items() if marks(row) & all_of), None
                ):
                    report.drop(f"in {benchmark}", row["prompt_id"])
                    continue
                count, own = 1, row["prompt_id"]
                while (named := digest(row["prompt_id"])) in ids:
                    count += 1
                    row["prompt_id"] = f"{own}-{count}"
                ids.add(named)
                if len(args.files) > 1 and files_of.setdefault(clip, source) != source:
                    two_files.add(clip)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                clips.append(clip)
                kept.append(digest(args.seed, row["prompt_id"]))
        finish(args, out, part, report, np.array(clips), np.array(kept), len(two_files))
    finally:
        part.unlink(missing_ok=True)


def finish(args, out, part, report, clips, order, two_files):
    """From the rows that could be made: the broken ones out, the limit, the held-out clips, the report."""
    good = np.ones(len(clips), dtype=bool)
    if args.check_media:
        recipe = media_config_from(args)._replace(allow_outside=True)
        told = examine(part, recipe, None, num_decoders())
        for i, problem in enumerate(tqdm(told, "decode", len(clips), disable=None)):
            if problem:
                good[i] = False
                report.drop("media broken", problem)
    broken = sum(report.dropped[reason] for reason in BAD)
    if broken > args.max_bad_frac * max(report.read, 1):
        told = "; ".join(
            f"{n} {k} ({report.examples[k]})" for k, n in report.dropped.most_common() if k in BAD
        )
        raise UserError(f"{broken} of {report.read} rows are broken, over --max-bad-frac: {told}")
    taken = np.flatnonzero(good)
    if args.limit and len(taken) > args.limit:
        taken = taken[np.argsort(order[taken], kind="stable")[: args.limit]]
        report.drop("over --limit", "chosen by --seed")
        report.dropped["over --limit"] = int(good.sum()) - args.limit
    apart, held, shown = set(), 0, []
    sizes = Counter(clips[taken].tolist()) if args.held_out else {}
    for clip in sorted(sizes, key=lambda clip: digest(args.seed, clip)):
        if held < args.held_out:
            apart.add(clip)
            held += sizes[clip]
    good[:] = False
    good[taken] = True
    names = out, out.with_name(f"{out.stem}.held-out.jsonl")
    outputs = [
        open(f"{name}.part2", "w", encoding="utf-8") for name in names[: 1 + bool(args.held_out)]
    ]
    counts = [0, 0]
    with open(part, encoding="utf-8") as file:
        for i, line in enumerate(file):
            if good[i]:
                to = int(int(clips[i]) in apart)
                outputs[to].write(line)
                counts[to] += 1
                row = json.loads(line)
                report.kinds[row["answer_type"]] += 1
                if len(shown) < args.html:
                    shown.append(row)
    for name, file in zip(names, outputs):
        file.close()
        os.replace(file.name, name)
    told = report.as_dict(kept=counts[0], held_out=counts[1], clips_in_two_files=two_files)
    write_text(
        out.with_name(f"{out.stem}.report.json"), json.dumps(told, indent=1, ensure_ascii=False)
    )
    if args.html:
        records = [as_record(row, out.name) for row in shown]
        recipe = media_config_from(args)._replace(allow_outside=True)
        write_items_page(
            out.with_suffix(".html"), out.name, records, {out.name: out.parent}, args.html, recipe
        )
    tell(told, out)


def as_record(row, name):
    """A row as items_page.py shows it: as the model gets it, and what is known of it."""
    keys = "prompt_id video audio images start end use_audio".split()
    record = {key: row.get(key) for key in keys} | dict(
        file=name, score=None, failure=None, parsed=None
    )
    record |= dict(
        prompt=question_text(row, False), truth=row["answer"], images=row.get("images") or []
    )
    reasoning = row.get("reasoning")
    return record | dict(completion=reasoning and f"<think>{reasoning}</think>")


def tell(report, out):
    """The report as a table."""
    lines = [("read", report["read"], ""), ("kept", report["kept"], str(out))]
    lines += [("held out", report["held_out"], "by clip")] * bool(report["held_out"])
    lines += [
        (f"dropped: {k}", v["count"], v["example"][:60]) for k, v in report["dropped"].items()
    ]
    lines += [(f"answers: {k}", n, "") for k, n in report["answer_types"].items()]
    if report["clips_in_two_files"]:
        lines.append(
            ("clips in two of the files", report["clips_in_two_files"], "train and test overlap?")
        )
    for name, count, more in lines:
        print(f"{name:40} {count:9}  {more}")


# ---- check -------------------------------------------------------------------------------------


def examine(path, recipe, count_tokens, workers):
    """For each row of a JSONL, in order: None, or one line that says why it would not train."""
    path, seen, waiting = Path(path), set(), deque()

    def look(row):
        if isinstance(row, BadRow):
            raise row
        row = normalize_row(row)
        clip = decode_clip(row, path.parent, recipe)
        if count_tokens:
            count_tokens(row, clip)

    def told(where, looked):
        if problem := looked.exception():
            if not isinstance(problem, BadRow):
                raise problem
            return f"{where}: {str(problem).removeprefix(f'{where}: ')}"

    with open(path, "rb") as file, ThreadPoolExecutor(workers) as pool:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}:{number}"
                try:
                    row = parse_line(line, where)
                    if (key := hash(prompt_id := row_id(row, where))) in seen:
                        raise BadRow(f"row {prompt_id}: the id occurs twice: make ids unique")
                    seen.add(key)
                except BadRow as problem:
                    row = problem
                waiting.append((where, pool.submit(look, row)))
            while len(waiting) > 4 * workers:
                yield told(*waiting.popleft())
        yield from (told(*item) for item in waiting)


def check(args):
    recipe, count_tokens, num_rows, num_bad = media_config_from(args), None, 0, 0
    check_file(args.file)
    if args.model:
        build = InputBuilder(args.model, recipe, Path(args.file).parent, audio_captions=True)
        recipe = build.recipe
        count_tokens = lambda row, clip: build.from_clip(row, clip, row.get("hint"))  # noqa: E731
    with open(args.file, "rb") as file:
        total = sum(1 for line in file if line.strip())
    told = examine(args.file, recipe, count_tokens, num_decoders())
    for problem in (bar := tqdm(told, "rows", total, disable=None)):
        num_rows, num_bad = num_rows + 1, num_bad + bool(problem)
        if problem:
            bar.write(problem)
    print(f"{num_rows} rows, {num_bad} would not train")
    sys.exit(1 if num_bad or not num_rows else 0)


# ---- captions and hints ------------------------------------------------------------------------


def captions(args):
    model = annotate.open_model(args, args.captioner, args.captioner_model)
    return annotate.annotate_rows(
        model,
        args.data,
        args.out,
        field="audio_caption",
        write=lambda row: annotate.write_caption(model, row),
        check=lambda row, caption: None,
        concurrency=args.concurrency,
    )


def hints(args):
    model = annotate.open_model(args, args.teacher, args.teacher_model)
    num_attempts = max(args.attempts, 1)
    return annotate.annotate_rows(
        model,
        args.data,
        args.out,
        field="hint",
        write=lambda row: annotate.write_hint(model, row, num_attempts),
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
