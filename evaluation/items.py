"""
An item of an evaluation: what is asked, whether it has been asked before, its record, its score.

A row is one of data/rows.py; a record is what records.jsonl keeps of it.
"""

import json

import numpy as np

import rewards
from data import clips
from data.clips import BadRow, decode_clip
from data.rows import SYSTEM_PROMPT, answer_spec, media_paths, normalize_row, question_text
from evaluation import benchmarks, protocol, scores


def out_of_reach(folder, rows, recipe):
    """-> for each row whose media cannot be reached, why; nothing is decoded."""
    lost = []
    for row in rows:
        # what is no text is a row that breaks the format, and is told as such
        paths = [path for path in media_paths(row) if isinstance(path, str) and "\0" not in path]
        try:
            for path in paths:
                clips.find_media(f"row {row['prompt_id']}", folder, path, recipe)
        except BadRow as problem:
            lost.append(str(problem))
    return lost


def hears(root, row, recipe):
    """Whether a clip's own sound is given: it has some, and no more than the recipe takes."""
    name = f"row {row['prompt_id']}"
    with clips.open_media(clips.find_media(name, root, row["video"], recipe), name) as container:
        length = np.inf if container.duration is None else container.duration / 1e6  # of µs
        span = min(row.get("end") or np.inf, length) - (row.get("start") or 0)
        return bool(container.streams.audio) and bool(span <= recipe.max_audio_seconds)


def new_record(name, row):
    """An item before it is asked: wrong, until something is known."""
    keys = "prompt_id answer_type options video audio images start end use_audio groups".split()
    record = dict(file=name) | {key: row.get(key) for key in keys}
    record["groups"] = record["groups"] or {"answer type": row.get("answer_type")}
    paths = media_paths(row)
    record["clip"] = str(paths[0] if paths else row["prompt_id"])
    record |= dict(question=row.get("question"), truth=row.get("answer"), prompt=None)
    return record | dict(completion=None, parsed=None, score=0.0, failure=None)


def scoring_of(row, authors):
    scoring = row.get("scoring") or "exact"
    return "exact" if authors and scoring == "f1" else scoring  # theirs: of the whole set


def unanswered(row, authors):
    """All measures of an item without an answer: a failure stays in every denominator."""
    scoring, truth = scoring_of(row, authors), row.get("answer")
    try:
        truth = None if truth is None else str(truth)
        truth = rewards.normalize_answer(truth, row.get("answer_type"), row.get("options"))
        return scores.measure(None, truth, scoring)
    except (ValueError, TypeError, AttributeError):  # it breaks the format: its truth is not known
        zeros = dict(count=["off_by_one"], f1=["exact", "f1"]).get(scoring, [])
        return dict.fromkeys(["score", *zeros], 0.0)


def holds(old, record):
    """Whether the record of an earlier command is of this very item, and need not be asked."""
    keys = "question truth options answer_type video audio images start end prompt".split()
    same = [record[k] for k in keys] == [old.get(k) for k in keys]
    same &= record["use_audio"] in (None, old.get("use_audio"))  # None: the clip decides
    return same and (old["completion"] is not None or old["failure"] is None)


def new_items(name, rows, have, args, template):
    """
    have     {(file, prompt_id): record} of earlier commands
    returns  [(row, record)] to ask; records of what is not: it breaks the format, is open, or is
             the very same in `have`
    """
    asked, settled, authors = [], [], args.protocol == "paper"
    for row in rows:
        record = new_record(name, row)
        try:
            row = normalize_row(row)
        except BadRow as problem:
            settled.append(record | unanswered(row, authors) | dict(failure=str(problem)))
            continue
        record |= {key: row[key] for key in ("options", "images")} | dict(truth=row["answer"])
        record |= unanswered(row, authors)
        if name not in benchmarks.BENCHMARKS:  # there it is decided by the clip
            record["use_audio"] = bool(row.get("use_audio"))
        if row.get("scoring") == "open":  # nobody could judge it: it is not asked either
            settled.append(record)
            continue
        record["prompt"] = asked_text(row, args, template)
        old = have.get((name, record["prompt_id"]))
        if old and holds(old, record):
            settled.append(old)
        else:
            asked.append((row, record))
    return asked, settled


def by_clip(items):
    """[(row, record)] -> lists of those about one clip, the same span and sound of it."""
    groups = {}
    for row, record in items:
        clip = [record[key] for key in ("video", "audio", "images", "start", "end", "use_audio")]
        groups.setdefault(json.dumps(clip), []).append((row, record))
    return [dict(items=items) for items in groups.values()]


def asked_text(row, args, template):
    """The user's turn as text."""
    if template:
        return template.replace("{question}", protocol.question_and_options(row))
    if args.protocol == "paper":
        return protocol.authors_text(row)
    return question_text(row, args.audio_captions)


def words_of(name, row, args, template):
    """-> system prompt, and the user's turn: text, or pieces with the media among them."""
    text, authors = asked_text(row, args, template), args.protocol == "paper"
    if row.get("inline") and (template or not authors):  # the authors' have them first
        text = protocol.in_place(text, row)
    return protocol.SYSTEM[name] if authors else SYSTEM_PROMPT, text


def read_clip(group):
    """
    A clip's questions -> for each its Prompt, or the BadRow that says why there is none. The clip
    is decoded once, and the prompts hold the very same media: a rollout reads these once.
    """
    build, words, clip, first, prompts = group["build"], group["words"], None, None, []
    for row, record in group["items"]:
        try:
            if clip is None:
                known = record["use_audio"]
                if known is None and row.get("video") and not row.get("audio"):
                    known = hears(build.root, row, build.recipe)
                clip = decode_clip(row | dict(use_audio=known), build.root, build.recipe)
            record["use_audio"] = clip.use_audio
            if first is not None and not row.get("inline"):
                prompts.append(build.with_text(first, row, words=words(row)))
                continue
            prompts.append(build.from_clip(row, clip, words=words(row)))
            if not row.get("inline"):  # there the media stand in other places each time
                first = prompts[-1]
        except BadRow as problem:
            prompts.append(problem)
    return prompts


def judge(record, row, text, truncated, name, authors):
    """Fills in what the completion says and what it is worth."""
    if authors:
        answer, form = protocol.authors_reading(name, row, text)
    else:
        answer, form = protocol.our_reading(row, text, truncated)
    record |= dict(completion=text, parsed=answer)
    if row["answer_type"] in ("ocr", "free-form"):
        record["score"] = rewards.accuracy_reward(answer, *answer_spec(row))
    else:
        truth = rewards.normalize_answer(*answer_spec(row))
        record |= scores.measure(form, truth, scoring_of(row, authors))
    if form is None:
        why = "cut off by --max-new-tokens" if truncated else "no answer found"
        record["failure"] = why if answer is None else "an answer that cannot be read for certain"
