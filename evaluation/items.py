"""
An item of an evaluation: a row as it is asked, its record, whether it was asked before, its score.

A row is one of data/rows.py; a record is what records.jsonl keeps of the item.
"""

import json
import math

import answers
import rewards
from data import clips
from data.clips import BadRow
from data.rows import answer_spec, media_paths, normalize_row
from evaluation import benchmarks, scores
from evaluation.protocol import parse_reply, user_text

CLIP_KEYS = ("video", "audio", "images", "start", "end")


# ---- media -------------------------------------------------------------------------------------


def missing_media(folder, rows, media_config):
    """-> one message for each row whose media cannot be reached; nothing is decoded."""
    problems = []
    for row in rows:
        try:
            for path in media_paths(row):
                # a path that is no text breaks the format, which is reported elsewhere
                if isinstance(path, str) and "\0" not in path:
                    clips.find_media(f"row {row['prompt_id']}", folder, path, media_config)
        except BadRow as problem:
            problems.append(str(problem))
    return problems


def has_usable_sound(folder, row, media_config):
    """Whether a row's video has sound of its own, and no more than the media limits allow."""
    name = f"row {row['prompt_id']}"
    path = clips.find_media(name, folder, row["video"], media_config)
    with clips.open_media(path, name) as container:
        length = math.inf
        if container.duration is not None:
            length = container.duration / 1e6  # from µs
        span = min(row.get("end") or math.inf, length) - (row.get("start") or 0)
        return bool(container.streams.audio) and span <= media_config.max_audio_seconds


def without_senses(row, without):
    """
    The row without its sound, its pictures, or both (`--without`).

    The sound of a video whose pictures are taken away is read from the file by its own clock.
    """
    row = dict(row)
    if "sound" in without:
        row |= dict(audio=None, use_audio=False)
    if "video" in without:
        if row.get("use_audio"):
            row |= dict(audio=row["video"], use_audio=False)
        row |= dict(video=None, images=[])
    return row


# ---- records -----------------------------------------------------------------------------------


def new_record(name, row):
    """The record of an item before it is asked: it counts as wrong."""
    paths = media_paths(row)
    return dict(
        file=name,
        prompt_id=row.get("prompt_id"),
        answer_type=row.get("answer_type"),
        options=row.get("options"),
        video=row.get("video"),
        audio=row.get("audio"),
        images=row.get("images"),
        start=row.get("start"),
        end=row.get("end"),
        use_audio=row.get("use_audio"),
        groups=row.get("groups") or {"answer type": row.get("answer_type")},
        clip=str(paths[0] if paths else row["prompt_id"]),
        question=row.get("question"),
        truth=row.get("answer"),
        prompt=None,
        completion=None,
        parsed=None,
        score=0.0,
        failure=None,
    )


def split_items(name, rows, previous, protocol):
    """
    Splits rows into items to ask and items that are settled: those that break the format, those
    that only a judge could score, and those that `previous` already holds.

    previous   {(file, prompt_id): record} of earlier commands
    returns    [(row, record)] to ask, [record] settled
    """
    to_ask, settled = [], []
    for row in rows:
        record = new_record(name, row)
        try:
            row = normalize_row(row)
        except BadRow as problem:
            record |= unanswered_scores(row, protocol)
            settled.append(record | dict(failure=str(problem)))
            continue
        record |= dict(options=row["options"], images=row["images"], truth=row["answer"])
        record |= unanswered_scores(row, protocol)
        if row.get("use_audio") == "auto":  # the clip decides
            record["use_audio"] = None
        elif name not in benchmarks.BENCHMARKS:  # in a benchmark the clip decides
            use_audio = row.get("use_audio") or False
            record["use_audio"] = None if use_audio == "auto" else use_audio
        if row.get("scoring") == "open":
            settled.append(record)
            continue
        record["prompt"] = user_text(row, protocol)
        old = previous.get((name, record["prompt_id"]))
        if old and is_same_item(old, record) and was_read(old):
            settled.append(old)
        else:
            to_ask.append((row, record))
    return to_ask, settled


def is_same_item(old, record):
    """Whether the record of an earlier command is of this very item."""
    keys = ("question", "truth", "options", "answer_type", "prompt", *CLIP_KEYS)
    if any(record[key] != old.get(key) for key in keys):
        return False
    # None: the clip decides
    return record["use_audio"] is None or record["use_audio"] == old.get("use_audio")


def was_read(record):
    """Whether the model replied, or there was nothing to ask; else the item is asked again."""
    return record["completion"] is not None or record["failure"] is None


# ---- scores ------------------------------------------------------------------------------------


def scoring_of(row, protocol):
    """How the item's answer becomes a score. The authors' scripts count whole sets of letters."""
    scoring = row.get("scoring") or "exact"
    return "exact" if protocol.is_authors and scoring == "f1" else scoring


def unanswered_scores(row, protocol):
    """All measures of an item without an answer: a failure stays in every denominator."""
    scoring, answer = scoring_of(row, protocol), row.get("answer")
    try:
        answer = None if answer is None else str(answer)
        truth = answers.normalize_answer(answer, row.get("answer_type"), row.get("options"))
        return scores.measure(None, truth, scoring)
    except (ValueError, TypeError, AttributeError):  # the row breaks the format: no known truth
        measures = {"count": ["score", "off_by_one"], "f1": ["score", "exact", "f1"]}
        return dict.fromkeys(measures.get(scoring, ["score"]), 0.0)


def score_record(record, row, text, truncated, *, name, protocol):
    """Fills in what the completion says and what it is worth."""
    answer, canonical = parse_reply(name, row, text, truncated, protocol)
    record |= dict(completion=text, parsed=answer)
    if row["answer_type"] in ("ocr", "free-form"):
        record["score"] = rewards.accuracy_reward(answer, *answer_spec(row))
    else:
        truth = answers.normalize_answer(*answer_spec(row))
        record |= scores.measure(canonical, truth, scoring_of(row, protocol))
    if canonical is not None:
        return
    if answer is not None:
        record["failure"] = "the answer is ambiguous"
    elif truncated:
        record["failure"] = "cut off by --max-new-tokens"
    else:
        record["failure"] = "no answer found"


# ---- clips -------------------------------------------------------------------------------------


def group_by_clip(items):
    """[(row, record)] -> lists of the items about one clip, with the same span and sound of it."""
    groups = {}
    for row, record in items:
        clip = json.dumps([record[key] for key in (*CLIP_KEYS, "use_audio")])
        groups.setdefault(clip, []).append((row, record))
    return list(groups.values())
