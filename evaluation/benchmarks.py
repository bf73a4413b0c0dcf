"""
The paper's benchmarks: the annotation files that each one publishes -> rows of ours (docs/data.md),
with what its score needs besides. Nothing is downloaded: a benchmark lies in a folder as its authors
publish it, archives unpacked, and an error names what is missing there.

A benchmark's row has more keys:

    groups     {name: value}   what its tables are split by; a value may be a list; where an item
                               lacks one, the value is "unlabelled"
    scoring    text            how an answer becomes a score, if not by being right (scores.py)
    use_audio  None            the clip's own sound is used if it has any: decided clip by clip
    inline     bool            its text names its media, [audio1], where they stand
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from answers import LETTERS
from data import readers
from data.clips import BadRow
from data.questions import cut_options

UNLABELLED = "unlabelled"


class Benchmark(NamedTuple):
    title: str  # as the paper's tables call it
    source: str  # where it is published: a dataset of the Hugging Face hub, or a repository
    rows: Callable  # folder -> its rows
    macro: str | None = None  # the score is the mean over this group's values; None: over the items
    shares: dict = {}  # weights of the values in that mean, where they are not 1


# ---- reading annotation files ------------------------------------------------------------------


def find_files(root, *patterns):
    """The files of the first pattern that matches any."""
    for pattern in patterns:
        files = sorted(Path(root).glob(pattern))
        if files:
            return files
    raise BadRow(f"no {' or '.join(patterns)} in {root}")


def annotations(root, *patterns):
    """Yields (file, record) for the files of the first pattern that matches any."""
    for file in find_files(root, *patterns):
        for record in readers.read_records(file, unwrap=False):
            if isinstance(record, BadRow):
                raise record
            yield file, record


def annotation_pairs(root, pattern):
    """Yields (file, key, value) of files that are one JSON object each."""
    for file in find_files(root, pattern):
        try:
            pairs = json.loads(file.read_text(encoding="utf-8")).items()
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{file} cannot be read ({error}): fetch it again") from None
        for key, value in pairs:
            yield file, key, value


# ---- paths of media ----------------------------------------------------------------------------


def first_existing(root, *candidates):
    """The first of these paths, relative to root, that exists; else the first, to be reported."""
    for path in candidates:
        if os.path.exists(Path(root) / path):
            return path
    return candidates[0]


def video_file(root, name, *folders):
    """The path of a video whose name the annotations give without its ending."""
    endings = (".mp4", ".MP4", ".mkv", ".webm")
    return first_existing(root, *(f"{d}/{name}{end}" for d in folders for end in endings))


# ---- choices: the answer keys of a row ---------------------------------------------------------


def is_letter(text):
    return len(text) == 1 and text.upper() in LETTERS


def choice_by_index(options, answer):
    """The right option's index from 0, or another answer as it is."""
    options = [str(option).strip() for option in options]
    if isinstance(answer, int) and answer < len(options) and any(map(is_letter, options)):
        # where options are letters themselves, an index would be read as one of them
        answer = options[answer]
    return dict(options=options, answer=answer, answer_type="choice")


def choice_by_letter(options, answer):
    """The right option's letter, bare or as "(B)" or "B."."""
    letter = str(answer).strip("(). ").upper()
    if is_letter(letter):
        return choice_by_index(options, LETTERS.index(letter))
    return choice_by_index(options, answer)


def choice_by_key(choices, answer):
    """Options with letters of their own, {letter: text}; an empty one is no option."""
    options = {key: str(text).strip() for key, text in choices.items() if text not in (None, "")}
    letter = str(answer).strip("(). ").upper()
    if any(map(is_letter, options.values())):  # as in choice_by_index
        letter = options.get(letter, letter)
    return dict(options=options, answer=letter, answer_type="choice")


def choice_by_text(options, answer):
    """The right option's text."""
    texts = [str(option).strip() for option in options]
    answer = str(answer).strip()
    return choice_by_index(options, texts.index(answer) if answer in texts else answer)


def labels(item, *names):
    """{name: value} of the fields that a benchmark's tables are split by."""
    return {name: item.get(name) for name in names}


def one_or_list(paths):
    """A single path as text, several as a list, none as None."""
    return paths[0] if len(paths) == 1 else paths or None


# ---- audio-visual ------------------------------------------------------------------------------


def omnibench(root):
    for _, item in annotations(root, "dataset/*.jsonl", "*.jsonl", "dataset/*.json"):
        image, audio = item["image_path"], item["audio_path"]
        yield dict(
            prompt_id=item["index"],
            question=item["question"],
            **choice_by_text(item["options"], item["answer"]),
            images=[first_existing(root, f"mm_data/image/{image}", f"image/{image}")],
            audio=first_existing(root, f"mm_data/audio/{audio}", f"audio/{audio}"),
            groups=labels(item, "task type", "audio type"),
        )


def daily_omni(root):
    for i, (_, item) in enumerate(annotations(root, "qa.json")):
        name = f"{item['video_id']}/{item['video_id']}_video.mp4"
        yield dict(
            prompt_id=i,  # the file has no ids
            question=item["Question"],
            **choice_by_letter(item["Choice"], item["Answer"]),
            video=first_existing(root, f"Videos/{name}", f"videos/{name}"),
            groups=labels(
                item, "Type", "content_parent_category", "video_category", "video_duration"
            ),
        )


def av_counting(root, reference=False):
    """CG-AV-Counting: over the whole video ("long"), or in the reference clip around the clues."""
    for i, (_, item) in enumerate(annotations(root, "cg-av-counting.json")):
        if reference:
            start, end = item["query_interval"]
            video = f"ref_videos/{Path(item['video']).stem}_{start:.2f}_{end:.2f}.mp4"
        else:
            name = item["video"]
            video = first_existing(root, f"cg_videos_720p/{name}", f"videos/{name}")
        yield dict(
            prompt_id=item.get("index", i),
            question=item["question"],
            answer=item["answer"],
            answer_type="number",
            scoring="count",
            video=video,
            groups=labels(item, "category", "type"),
        )


def av_odyssey(root):
    """Media stand where the question or an option names them: [audio1], [img2], [video1]."""
    patterns = ("av_odyssey.json", "av_odyssey.jsonl", "*.parquet", "data/*.parquet")
    for _, item in annotations(root, *patterns):
        yield dict(
            prompt_id=item["question_id"],
            question=item["question"],
            **choice_by_letter(item["options"], item["answer"]),
            images=item["image_path"] or [],
            video=one_or_list(item["video_path"] or []),  # several: reported as a bad row
            audio=one_or_list(item["audio_path"] or []),
            inline=True,
            groups={"subfield": item.get("subfield"), "task": item.get("question_type_id")},
        )


def worldsense(root):
    for _, video, about in annotation_pairs(root, "worldsense_qa.json"):
        for name, task in about.items():
            if not re.fullmatch(r"task\d+", name):
                continue
            yield dict(
                prompt_id=f"{video}-{name}",
                question=task["question"],
                **choice_by_letter(task["candidates"], task["answer"]),
                video=video_file(root, video, "videos", "."),
                groups={
                    "domain": about.get("domain"),
                    "task domain": task.get("task_domain"),
                    "task type": task.get("task_type"),
                },
            )


INTENTBENCH_TYPES = {"multiple choice": "choice", "emer_ov_mc": "multi", "judge": "yesno"}


def intentbench(root):
    for i, (_, item) in enumerate(annotations(root, "qa.json")):
        kind = item["problem_type"]
        file = item.get("video") or item["path"]
        answer = item["solution"] if item.get("answer") is None else item["answer"]
        ids = [item[key] for key in ("qid", "Question id") if item.get(key) is not None]
        yield dict(
            prompt_id=ids[0] if ids else i,
            question=item["problem"],
            options=None if kind == "judge" else item["options"],
            answer=re.sub(r"</?answer>", "", str(answer)).strip(),
            answer_type=INTENTBENCH_TYPES.get(kind, kind),
            scoring="f1" if kind == "emer_ov_mc" else "exact",
            video=first_existing(root, f"videos/{file}", file),
            groups={"problem_type": kind},
        )


# ---- video understanding -----------------------------------------------------------------------

MVBENCH_FOLDERS = {  # task -> where its clips lie below video/
    "object_interaction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_localization": "sta/sta_video",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "counterfactual_inference": "clevrer/video_validation",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "object_shuffle": "perception/videos",
    "state_change": "perception/videos",
    "action_count": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "scene_transition": "scene_qa/video",
    "action_antonym": "ssv2_video",
    "unexpected_action": "FunQA_test/test",
}
TVQA_FPS = 3  # its videos are published as folders of frames, at this rate
MAX_TVQA_FRAMES = 32


def mvbench(root):
    for file, item in annotations(root, "json/*.json"):
        task, name = file.stem, item["video"]
        folder = MVBENCH_FOLDERS.get(task, task)
        archive = folder.partition("/")[0]  # where the archives are unpacked each in its own folder
        path = first_existing(
            root,
            f"video/{folder}/{name}",
            f"video/{archive}/{folder}/{name}",
            f"video/data0613/{folder}/{name}",
        )
        row = dict(
            prompt_id=f"{task}-{Path(name).stem}",
            question=item["question"],
            **choice_by_text(item["candidates"], item["answer"]),
            groups={"task": task},
        )
        span = {}
        if item.get("start") is not None:
            span = dict(start=float(item["start"]), end=float(item["end"]))
        is_inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if is_inside and os.path.isdir(Path(root) / path):
            yield row | dict(video=None, images=frames_of_folder(root, path, **span))
        else:
            yield row | dict(video=path) | span


def frames_of_folder(root, path, start=0.0, end=None):
    """The paths of at most 32 frames of a TVQA folder between two times in seconds."""
    names = sorted(frame.name for frame in (Path(root) / path).iterdir())
    first = round(TVQA_FPS * start)
    last = len(names) if end is None else round(TVQA_FPS * end)
    names = names[first : max(last, first + 1)]
    stride = -(-len(names) // MAX_TVQA_FRAMES) or 1
    return [f"{path}/{name}" for name in names[::stride]]


def video_mme(root):
    for _, item in annotations(root, "videomme/*.parquet", "*.parquet", "videomme*.json*"):
        yield dict(
            prompt_id=item["question_id"],
            question=item["question"],
            **choice_by_letter(item["options"], item["answer"]),
            video=video_file(root, item["videoID"], "data", "videos", "."),
            groups=labels(item, "duration", "domain", "sub_category", "task_type"),
        )


def lvbench(root):
    for _, about in annotations(root, "video_info.meta.jsonl", "data/video_info.meta.jsonl"):
        video = video_file(root, about["key"], "all_videos", "videos", ".")
        for item in about["qa"]:
            question, options = cut_options(item["question"])
            yield dict(
                prompt_id=f"{about['key']}-{item['uid']}",
                question=question,
                **choice_by_letter(options, item["answer"]),
                video=video,
                groups={
                    "question type": item.get("question_type"),
                    "video type": about.get("type"),
                },
            )


def video_holmes(root):
    for _, item in annotations(root, "test_Video-Holmes.json"):
        options = [item["Options"][letter] for letter in sorted(item["Options"])]
        yield dict(
            prompt_id=f"{item['video ID']}-{item['Question ID']}",
            question=item["Question"],
            **choice_by_letter(options, item["Answer"]),
            video=video_file(root, item["video ID"], "videos", "videos_cropped"),
            groups=labels(item, "Question Type"),
        )


def mmvu(root):
    for _, item in annotations(root, "validation.json", "data/validation.json"):
        if item["question_type"] == "multiple-choice":
            answer = choice_by_key(item["choices"], item["answer"])
        else:
            answer = dict(answer=item["answer"], answer_type="text", scoring="open")
        subject = (item.get("metadata") or {}).get("subject")
        yield dict(
            prompt_id=item["id"],
            question=item["question"],
            **answer,
            video=item["video"].partition("/resolve/main/")[2] or item["video"],
            groups={"subject": subject, "type": item["question_type"]},
        )


def tomato(root):
    for file, number, item in annotation_pairs(root, "data/*.json"):
        yield dict(
            prompt_id=f"{file.stem}-{number}",
            question=item["question"],
            **choice_by_index(item["options"], int(item["answer"])),
            video=f"videos/{item['demonstration_type']}/{item['key']}.mp4",
            groups={"reason": file.stem, "demonstration": item["demonstration_type"]},
        )


# ---- video reasoning ---------------------------------------------------------------------------

MMMU_DISCIPLINES = {  # as the archives are called -> their subjects; all others: Medicine
    "Art": "Art Art_Theory Design Music",
    "Science": "Biology Chemistry Geography Math Physics",
    "Humanities": "History Literature Sociology Psychology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
    "Business": "Accounting Economics Finance Manage Marketing",
}


def discipline_of(item_id):
    """validation_Art_Theory_3 -> Art"""
    subject = "_".join(item_id.split("_")[1:-1])
    for discipline, subjects in MMMU_DISCIPLINES.items():
        if subject in subjects.split():
            return discipline
    return "Medicine"


def video_mmmu(root):
    """The track Adaptation asks about a picture besides the video."""
    for track in ("Perception", "Comprehension", "Adaptation"):
        patterns = (f"{track}/**/*.parquet", f"{track}/*.json*", f"{track}.json*")
        for _, item in annotations(root, *patterns):
            discipline = discipline_of(item["id"])
            folders = (discipline, f"videos/{discipline}", "videos")
            answer = dict(answer=item["answer"], answer_type="text", scoring="open")
            if item.get("options"):
                answer = choice_by_letter(item["options"], item["answer"])
            elif re.fullmatch(r"-?[\d,]*\.?\d+", str(item["answer"]).strip()):
                answer |= dict(answer_type="number", scoring="rounded")
            yield dict(
                prompt_id=f"{track}-{item['id']}",
                question=item["question"],
                **answer,
                video=video_file(root, item["id"], *folders),
                images=[picture_path(root, item)] if track == "Adaptation" else [],
                groups={"track": track, "discipline": discipline},
            )


def picture_path(root, item):
    """images/ID.png; a picture inside the annotations is written to images/ under its hash."""
    picture = item.get("image")
    if not isinstance(picture, dict) or not picture.get("bytes"):
        return f"images/{item['id']}.png"
    content = picture["bytes"]
    name = f"images/{hashlib.blake2b(content, digest_size=12).hexdigest()}.png"
    path = Path(root) / name
    if path.exists():
        return name
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # every rank writes it
    try:
        path.parent.mkdir(exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        why = f"{path} cannot be written ({error.strerror})"
        raise BadRow(f"{why}: change the folder's permissions") from None
    return name


VSI_SHARES = {f"object_rel_direction_{level}": 1 / 3 for level in ("easy", "medium", "hard")}


def vsi_bench(root):
    for _, item in annotations(root, "test.jsonl", "test*.parquet"):
        if item.get("options"):
            answer = choice_by_letter(item["options"], item["ground_truth"])
        else:
            answer = dict(answer=item["ground_truth"], answer_type="number", scoring="mra")
        yield dict(
            prompt_id=item["id"],
            question=item["question"],
            **answer,
            video=f"{item['dataset']}/{item['scene_name']}.mp4",
            groups={"question type": item.get("question_type"), "dataset": item["dataset"]},
        )


def video_tt(root):
    """The split of choices is scored; the open-ended ones need a judge."""
    for file, item in annotations(root, "data/test*.parquet", "test*.json*", "data/test*.json*"):
        split = re.sub(r"-\d+-of-\d+$", "", file.stem)
        question, options = cut_options(item["question"])
        options = list(item.get("options") or options)
        if options:
            answer = choice_by_letter(options, item["answer"])
        else:
            answer = dict(answer=item["answer"], answer_type="text", scoring="open")
        folders = ("Benchmark-AllVideos-LQ", "video", "videos")
        yield dict(
            prompt_id=f"{split}-{item['question_id']}",
            question=question,
            **answer,
            video=video_file(root, item["video_id"], *folders),
            groups={"capability": item.get("capability"), "split": split},
        )


# ---- the table ---------------------------------------------------------------------------------

BENCHMARKS = {
    "omnibench": Benchmark("OmniBench", "m-a-p/OmniBench", omnibench),
    "daily-omni": Benchmark("DailyOmni", "liarliar/Daily-Omni", daily_omni),
    "av-counting": Benchmark("AV-Counting", "CG-Bench/CG-AV-Counting", av_counting),
    "av-odyssey": Benchmark("AV-Odyssey", "AV-Odyssey/AV_Odyssey_Bench_LMMs_Eval", av_odyssey),
    "worldsense": Benchmark("WorldSense", "honglyhly/WorldSense", worldsense),
    "intentbench": Benchmark("IntentBench", "PhilipC/IntentBench", intentbench),
    "mvbench": Benchmark("MVBench", "OpenGVLab/MVBench", mvbench, macro="task"),
    "video-mme": Benchmark("Video-MME", "lmms-lab/Video-MME", video_mme),
    "lvbench": Benchmark("LVBench", "THUDM/LVBench", lvbench),
    "video-holmes": Benchmark("Video-Holmes", "TencentARC/Video-Holmes", video_holmes),
    "mmvu": Benchmark("MMVU", "yale-nlp/MMVU", mmvu),
    "tomato": Benchmark("TOMATO", "github.com/yale-nlp/TOMATO", tomato),
    "video-mmmu": Benchmark("Video-MMMU", "lmms-lab/VideoMMMU", video_mmmu, macro="track"),
    "vsi-bench": Benchmark(
        "VSI-Bench", "nyu-visionx/VSI-Bench", vsi_bench, macro="question type", shares=VSI_SHARES
    ),
    "video-tt": Benchmark("Video-TT", "lmms-lab/video-tt", video_tt),
}
BENCHMARKS["av-counting-ref"] = BENCHMARKS["av-counting"]._replace(
    title="AV-Counting (reference clips)", rows=partial(av_counting, reference=True)
)
PAPER_TABLES = {  # of the paper, in its order
    "Audio-visual": "omnibench daily-omni av-counting av-odyssey worldsense intentbench".split(),
    "Video": "mvbench video-mme lvbench video-holmes mmvu tomato".split(),
    "Ablation": "omnibench daily-omni av-odyssey video-mmmu vsi-bench video-tt".split(),
}


def load(name, root):
    """
    -> the folder that media paths are relative to, the rows of a benchmark with unique ids.

    root     folder of the benchmark, or one that holds a folder of its name
    raises   BadRow   there are no annotations, or not of the published form
    """
    benchmark = BENCHMARKS[name]
    own_folder = Path(root) / name.removesuffix("-ref")
    folder = own_folder if own_folder.is_dir() else Path(root)
    remedy = f"{name} is published as {benchmark.source}: put it there as it is, archives unpacked"
    rows, ids = [], set()
    try:
        for row in benchmark.rows(folder):
            row["prompt_id"] = unique_id(f"{name}-{row['prompt_id']}", ids)
            ids.add(row["prompt_id"])
            for group, value in row["groups"].items():
                if not value and value != 0:
                    row["groups"][group] = UNLABELLED
            rows.append(row)
    except BadRow as problem:
        raise BadRow(f"{problem}; {remedy}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"item {len(rows)} is not as published ({type(error).__name__} {error})"
        raise BadRow(f"{folder}: {why}; {remedy}") from None
    if not rows:
        raise BadRow(f"{folder} has annotations without a question; {remedy}")
    return folder, rows


def unique_id(wanted, ids):
    """The id itself, or with -2, -3, ... where it is taken."""
    count, unique = 1, wanted
    while unique in ids:
        count += 1
        unique = f"{wanted}-{count}"
    return unique
