"""
Files of records -> a JSONL of rows, and a report of what became of every record that was read:

    read = kept + held out + dropped, by reason

Rows are written to a temporary file as they are made: memory holds a few numbers a row.
"""

import base64
import hashlib
import json
import math
import os
import re
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from answers import ANSWER_TYPES
from data import converters, readers
from data.clips import BadRow
from data.converters import Dropped
from data.row_check import check_rows
from data.rows import (
    check_file,
    clip_of,
    correct_letter,
    media_paths,
    normalize_row,
    stable_hash,
)
from run.errors import UserError

# reasons that speak of a broken file, or of the wrong command, rather than of a row that is left out
BROKEN = (
    "unreadable",
    "a form that is not known",
    "a benchmark's own file",
    "a column of --map is missing",
    "no answer",
    "not as published",
    "breaks the format",
    "media missing",
    "media broken",
)
REMEDIES = {  # reason -> what may help
    "unreadable": "give JSON, JSONL, CSV, parquet or Arrow; datasets: Dataset.to_parquet()",
    "a form that is not known": "name the columns: --map question=COLUMN,answer=COLUMN,video=COLUMN",
    "a benchmark's own file": "it is to be evaluated, not trained on",
    "no answer": "name its column: --map question=COLUMN,answer=COLUMN,video=COLUMN",
    "media missing": "--media FOLDER is what paths are relative to; --allow-missing keeps such rows",
    "several turns": "a row has one question: split such records, each with what it needs to know",
    "a box is the answer": "no answer_type scores boxes; --open-type text keeps them (equal or not)",
}
DATA_URI = re.compile(r"data:(?:image|video|audio)[\w/.+-]*;base64,")
ONE_SIDED = 0.6  # share of a type's commonest answer above which the report warns
MIN_ROWS_FOR_SHARE = 10  # of a type: fewer say nothing about shares


class Report:
    """What became of every record that was read."""

    def __init__(self):
        self.num_read = 0
        self.dropped = Counter()  # reason -> records
        self.examples = {}  # reason -> the first example
        self.answer_types = Counter()
        self.warnings = []

    def drop(self, reason, example, count=1):
        self.dropped[reason] += count
        self.examples.setdefault(reason, str(example)[:400])

    def num_broken(self):
        return sum(self.dropped[reason] for reason in BROKEN)

    def causes(self, reasons):
        """Why records were dropped, in words: the most frequent reason first, each with its remedy."""
        parts = []
        for reason, count in self.dropped.most_common():
            if reason not in reasons:
                continue
            part = f"{count} {reason} ({self.examples[reason]})"
            remedy = REMEDIES.get(reason)
            parts.append(f"{part}: {remedy}" if remedy else part)
        return "; ".join(parts) or "the files hold no record"

    def stop_if_useless(self, num_rows, max_bad_frac):
        """Raises UserError if nothing is left, or too much is broken."""
        forms = ""
        if self.dropped["a form that is not known"]:
            forms = f"; known forms: {', '.join(converters.FORMATS)} (docs/data.md)"
        if num_rows == 0:
            raise UserError(
                f"none of {self.num_read} records makes a row: {self.causes(self.dropped)}{forms}"
            )
        num_broken = self.num_broken()
        if num_broken > max_bad_frac * max(self.num_read, 1):
            raise UserError(
                f"{num_broken} of {self.num_read} rows are broken, over --max-bad-frac "
                f"{max_bad_frac:g}: {self.causes(BROKEN)}{forms}"
            )


class Conversion:
    """
    out        Path      the JSONL to write; beside it OUT.held-out.jsonl
    context    converters.Context
    form       str       name of a format of converters.FORMATS; None: by the keys of each record
    """

    def __init__(self, out, context, form=None):
        self.out = Path(out)
        self.context = context
        self.form = form
        self.report = Report()
        self.part = self.out.with_name(self.out.name + ".part")
        self.held_out_path = self.out.with_name(f"{self.out.stem}.held-out.jsonl")

        # one number a row, in the order of the temporary file
        self.clips = array("q")  # digest of the clip
        self.ranks = array("q")  # which rows --limit and --max-answer-share take first
        self.answers = array("q")  # digest of the answer's type and the answer
        self.types = array("b")  # place of the answer_type in ANSWER_TYPES
        self.kept = None  # (rows,) bool
        self.held_out = None  # (rows,) bool
        self.has_sound = None  # (rows,) bool, once the media are checked

        self.num_clips_in_two_files = 0
        self.has_media_outside = False
        self.num_auto = 0  # rows whose use_audio is "auto"
        self.num_silent = 0  # of these, kept ones without sound

    # ---- records -> rows in the temporary file

    def read(self, files, allow_missing, benchmarks):
        """
        files        of records
        benchmarks   {name: fingerprints}: rows of these are dropped
        """
        rows_so_far, ids = set(), set()
        file_of_clip, in_two_files = {}, set()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.part, "w", encoding="utf-8") as part:
            for source, row in self._rows_of_files(files):
                try:
                    self._resolve_media_paths(row, allow_missing)
                    row = normalize_row(row)
                except FileNotFoundError as problem:
                    self.report.drop("media missing", problem)
                    continue
                except BadRow as problem:
                    self.report.drop("breaks the format", problem)
                    continue
                row = {key: value for key, value in row.items() if value not in (None, [], "")}

                # rows about parts of a file, or about it without its sound, are held out together
                *files_of_clip, _, _, _ = clip_of(row)
                clip = digest(*files_of_clip)
                same = digest(*clip_of(row), row["question"], row["answer"])
                if same in rows_so_far:
                    self.report.drop("the same question about the same clip", row["prompt_id"])
                    continue
                rows_so_far.add(same)
                benchmark = benchmark_of(row, benchmarks)
                if benchmark:
                    self.report.drop(f"in {benchmark}", row["prompt_id"])
                    continue
                make_id_unique(row, ids)
                if len(files) > 1 and file_of_clip.setdefault(clip, source) != source:
                    in_two_files.add(clip)
                part.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._remember(row, clip)
        self.num_clips_in_two_files = len(in_two_files)
        self.kept = np.ones(len(self.clips), dtype=bool)
        self.held_out = np.zeros(len(self.clips), dtype=bool)

    def _remember(self, row, clip):
        self.clips.append(clip)
        self.ranks.append(digest(self.context.seed, row["prompt_id"]))
        answer = row["answer"].casefold()
        if row["answer_type"] == "choice":  # the place of the right option is what may be one-sided
            answer = correct_letter({"options": None, **row})
        self.answers.append(digest(row["answer_type"], answer))
        self.types.append(ANSWER_TYPES.index(row["answer_type"]))
        self.num_auto += row.get("use_audio") == "auto"
        self.has_media_outside |= any(is_outside(path) for path in media_paths(row))

    def _rows_of_files(self, files):
        """Yields (file, row); records that make none are counted in the report."""
        for file in files:
            check_file(file, "give a file of JSON, JSONL, CSV, parquet or Arrow")
            self._learn_labels(file)
            records = tqdm(readers.read_records(file), file.name, unit=" rows", disable=None)
            for number, record in enumerate(records):
                for row in self._rows_of_record(record, f"{file.name}, record {number}"):
                    row.setdefault("prompt_id", None)
                    if row["prompt_id"] is None:
                        row["prompt_id"] = f"{file.stem}-{number}"
                    row["prompt_id"] = str(row["prompt_id"])
                    yield file, row

    def _rows_of_record(self, record, where):
        """
        The rows that a record makes. It counts as read once for each of its rows, and once for what
        could not be made of it.
        """
        report = self.report
        try:
            if isinstance(record, BadRow):
                raise Dropped("unreadable", record)
            record = extract_media(record, self.out.parent / "media")
            for row in self._convert(record):
                report.num_read += 1
                yield row
        except Dropped as dropped:
            report.num_read += 1
            reason, *example = dropped.args
            report.drop(reason, f"{where}: {example[-1]}" if example else where)
        except KeyError as error:
            report.num_read += 1
            keys = ", ".join(str(key) for key in record)
            reason = f"no {error} among its keys: {keys}"
            report.drop("not as published", f"{where}: {reason}: give another --from, or none")
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            report.num_read += 1
            report.drop("not as published", f"{where}: {type(error).__name__} {error}")

    def _convert(self, record):
        if self.context.columns:
            return converters.mapped(record, self.context)
        name = self.form or converters.format_of(record)
        return converters.FORMATS[name].convert(record, self.context)

    def _learn_labels(self, file):
        """A first pass over files whose wrong options come from all their labels."""
        first = next((r for r in readers.read_records(file) if isinstance(r, dict)), {})
        if self._form_of(first) not in converters.INDEXED_FORMATS:
            return
        for record in readers.read_records(file):
            if isinstance(record, dict):
                converters.index_labels(self._form_of(record), record, self.context)

    def _form_of(self, record):
        """The name of a record's format, or None."""
        if self.context.columns:
            return None
        try:
            return self.form or converters.format_of(record)
        except Dropped:
            return None

    def _resolve_media_paths(self, row, allow_missing):
        """In place: media paths as seen from the folder of OUT. raises FileNotFoundError"""

        def resolve(path):
            whole = self.context.media / str(path).removeprefix("file://")
            if not allow_missing and not whole.is_file():
                raise FileNotFoundError(f"{row['prompt_id']}: no file at {whole}")
            return Path(os.path.relpath(whole, self.out.parent)).as_posix()

        for kind in ("video", "audio", "images"):
            paths = row.get(kind)
            if isinstance(paths, list):
                row[kind] = [resolve(path) for path in paths]
            elif paths:
                row[kind] = resolve(paths)

    # ---- which rows stay

    def check_media(self, config, num_threads):
        """Decodes every clip. Broken ones are dropped; use_audio "auto" becomes true or false."""
        checks = check_rows(self.part, config._replace(allow_outside=True), None, num_threads)
        self.has_sound = np.zeros(len(self.clips), dtype=bool)
        for i, check in enumerate(tqdm(checks, "decode", len(self.clips), disable=None)):
            self.has_sound[i] = check.has_sound
            if check.problem:
                self.kept[i] = False
                self.report.drop("media broken", check.problem)

    def drop_common_answers(self, max_share):
        """Of each answer type's commonest answer, so many rows go that no more than this share has it."""
        types, answers = np.array(self.types), np.array(self.answers)
        for answer_type, (common, count, total) in self._common_answers().items():
            num_others = total - count
            # allowed / (allowed + num_others) <= max_share
            allowed = int(max_share * num_others / (1 - max_share)) if max_share < 1 else count
            if not num_others or count <= allowed:
                continue
            index = ANSWER_TYPES.index(answer_type)
            rows = np.flatnonzero(self.kept & (types == index) & (answers == common))
            surplus = self._in_order(rows)[allowed:]
            self.kept[surplus] = False
            self.report.drop("over --max-answer-share", answer_type, len(surplus))

    def limit(self, most):
        rows = np.flatnonzero(self.kept)
        if len(rows) <= most:
            return
        surplus = self._in_order(rows)[most:]
        self.kept[surplus] = False
        self.report.drop("over --limit", "chosen by --seed", len(surplus))

    def hold_out(self, num_rows):
        """About num_rows rows are set apart, all rows of a clip together."""
        # by a digest of the clip and not by its place: the same clips whatever else is in the files
        clips = np.array(self.clips)
        sizes = Counter(clips[self.kept].tolist())
        apart, total = set(), 0
        for clip in sorted(sizes, key=lambda clip: digest(self.context.seed, clip)):
            if total >= num_rows:
                break
            apart.add(clip)
            total += sizes[clip]
        self.held_out = self.kept & np.isin(clips, list(apart))
        num_kept = int(self.kept.sum())
        if num_rows > 0 and self.held_out.sum() == num_kept:
            raise UserError(
                f"--held-out {num_rows} leaves no row to train on: all {num_kept} rows would be held "
                "out (the rows of a clip stay together): give a smaller number, or leave it out"
            )

    def _in_order(self, rows):
        """Row numbers in the random order that the seed gives."""
        return rows[np.argsort(np.array(self.ranks)[rows], kind="stable")]

    def _common_answers(self):
        """-> {answer_type: (digest of its commonest answer, rows that have it, rows of the type)}"""
        types, answers = np.array(self.types), np.array(self.answers)
        result = {}
        for index, answer_type in enumerate(ANSWER_TYPES):
            of_type = answers[self.kept & (types == index)]
            if len(of_type):
                values, counts = np.unique(of_type, return_counts=True)
                most = counts.argmax()
                result[answer_type] = (values[most], int(counts[most]), len(of_type))
        return result

    # ---- writing

    def write(self, with_held_out, num_shown):
        """Writes OUT and, with_held_out, OUT.held-out.jsonl -> the first num_shown rows."""
        shown, num_long_texts = [], 0
        answer_texts = {}  # digest of a commonest answer -> its text
        commonest = {common for common, _, _ in self._common_answers().values()}
        paths = [self.out, self.held_out_path] if with_held_out else [self.out]
        outputs = [open(f"{path}.part2", "w", encoding="utf-8") for path in paths]
        with open(self.part, encoding="utf-8") as part:
            for i, line in enumerate(part):
                if not self.kept[i]:
                    continue
                row = json.loads(line)
                # the media were decoded: "auto" is decided
                if row.get("use_audio") == "auto" and self.has_sound is not None:
                    row["use_audio"] = bool(self.has_sound[i])
                    self.num_silent += not row["use_audio"]
                    line = json.dumps(row, ensure_ascii=False) + "\n"
                outputs[int(self.held_out[i])].write(line)
                self.report.answer_types[row["answer_type"]] += 1
                is_long = len(row["answer"].split()) >= converters.MANY_WORDS
                num_long_texts += row["answer_type"] == "text" and is_long
                if self.answers[i] in commonest:
                    answer_texts.setdefault(self.answers[i], row["answer"])
                if len(shown) < num_shown:
                    shown.append(row)
        for path, file in zip(paths, outputs):
            file.close()
            os.replace(file.name, path)
        self._warn(answer_texts, num_long_texts)
        return shown

    def _warn(self, answer_texts, num_long_texts):
        warnings = self.report.warnings
        for answer_type, (common, count, total) in self._common_answers().items():
            if total >= MIN_ROWS_FOR_SHARE and count > ONE_SIDED * total:
                answer = answer_texts[common]
                warnings.append(
                    f"{count} of {total} {answer_type} answers are {answer!r:.40}: "
                    "--max-answer-share .5 drops such rows"
                )
        if num_long_texts:
            warnings.append(
                f"{num_long_texts} text answers have {converters.MANY_WORDS} words or more, and only "
                "the same words score: --open-type free-form scores by overlap"
            )
        if self.has_media_outside:
            warnings.append(
                f"media lie outside {self.out.parent}: train with --allow-outside, or link them there"
            )

    def as_dict(self):
        """The report as JSON."""
        report = self.report
        num_held_out = int(self.held_out.sum())
        result = dict(
            read=report.num_read,
            kept=int(self.kept.sum()) - num_held_out,
            held_out=num_held_out,
            clips_in_two_files=self.num_clips_in_two_files,
        )
        result["dropped"] = {}
        for reason, count in report.dropped.most_common():
            result["dropped"][reason] = dict(count=count, example=report.examples[reason])
        result["answer_types"] = dict(report.answer_types.most_common())
        result["changed"] = {}
        for reason, count in self.context.notes.most_common():
            example = self.context.note_examples[reason]
            result["changed"][reason] = dict(count=count, example=example)
        result["use_audio_auto"] = self.num_auto
        if self.has_sound is not None:
            result["silent_videos"] = self.num_silent
        result["warnings"] = report.warnings
        return result


# ---- parts ---------------------------------------------------------------------------------------


def digest(*words):
    """A 64-bit number of some texts and numbers, the same in every process."""
    return stable_hash(repr(words))


def make_id_unique(row, ids):
    """In place: -2, -3 … after an id that occurs before. ids: digests, added to."""
    prompt_id = row["prompt_id"]
    count = 1
    while digest(row["prompt_id"]) in ids:
        count += 1
        row["prompt_id"] = f"{prompt_id}-{count}"
    ids.add(digest(row["prompt_id"]))


def is_outside(path):
    return path.startswith("../") or os.path.isabs(path)


def extract_media(value, folder):
    """
    A record whose media are files: what it holds as {"bytes", "path"} or as a data URI is written to the
    folder, named by its hash. NaN, which pandas writes for an empty cell, becomes None.
    """
    if isinstance(value, list):
        return [extract_media(item, folder) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str):
        uri = DATA_URI.match(value)
        return write_medium(base64.b64decode(value[uri.end() :]), "", folder) if uri else value
    if not isinstance(value, dict):
        return value
    content = value.get("bytes")
    if not isinstance(content, bytes):
        return {key: extract_media(item, folder) for key, item in value.items()}
    return write_medium(content, Path(str(value.get("path"))).suffix, folder)


def write_medium(content, suffix, folder):
    """Writes bytes to a file of the folder -> its whole path."""
    name = hashlib.blake2b(content, digest_size=12).hexdigest() + suffix
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        (folder / f"{name}.part").write_bytes(content)
        os.replace(folder / f"{name}.part", folder / name)
    return str((folder / name).resolve())


def fingerprint(row):
    """What identifies a benchmark's row: names of its clips, YouTube ids in them, its question."""
    marks = {" ".join(str(row.get("question")).lower().split())}
    for path in media_paths(row):
        stem = Path(str(path)).stem
        marks.add(stem)
        youtube_id = re.match(r"[\w-]{11}(?=_\d|_video|$)", stem)
        if youtube_id:
            marks.add(youtube_id[0])
    return marks


def benchmark_of(row, benchmarks):
    """benchmarks: {name: fingerprints} -> the name of the first that holds the row, or None."""
    if not benchmarks:
        return None
    marks = fingerprint(row)
    return next((name for name, held in benchmarks.items() if marks & held), None)
