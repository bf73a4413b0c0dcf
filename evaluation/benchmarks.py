"""
The paper's benchmarks: each one's own published annotation files -> rows of ours (docs/data.md), with
what its score needs besides. Nothing is downloaded: a benchmark lies in a folder as its authors
publish it, archives unpacked, and what is missing there is named.

A row of a benchmark has more keys:

    groups     {name: value}   what its tables are split by; a value may be a list; what an item does
                               not tell is "unlabelled"
    scoring    text            how an answer becomes a score, if not by being right (scores.py)
    use_audio  None            the clip's own sound is heard if it has any: decided clip by clip
    inline     bool            its text names its media, [audio1], where they stand
"""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.clips import BadRow
from evaluation.annotations import (
    annotations,
    by_key,
    by_letter,
    by_text,
    certain,
    cut_options,
    place,
    video_file,
)

UNLABELLED = "unlabelled"


class Benchmark(NamedTuple):
    title: str  # as the paper's tables call it
    source: str  # where it is published: a dataset of the Hugging Face hub, or a repository
    rows: Callable  # folder -> its rows
    macro: str | None = None  # the score is the mean over this group's values; None: over the items
    shares: dict = {}  # weights of the values in that mean, where they are not 1


# ---- audio-visual ------------------------------------------------------------------------------


def omnibench(root):
    for _, item in annotations(root, "dataset/*.jsonl", "*.jsonl", "dataset/*.json"):
        yield dict(
            prompt_id=item["index"],
            question=item["question"],
            **by_text(item["options"], item["answer"]),
            images=[place(root, *(f"{d}image/{item['image_path']}" for d in ("mm_data/", "")))],
            audio=place(root, *(f"{d}audio/{item['audio_path']}" for d in ("mm_data/", ""))),
            groups={name: item.get(name) for name in ("task type", "audio type")},
        )


def daily_omni(root):
    for i, (_, item) in enumerate(annotations(root, "qa.json")):
        video = item["video_id"]
        names = ("Type", "content_parent_category", "video_category", "video_duration")
        yield dict(
            prompt_id=i,  # the file has no ids
            question=item["Question"],
            **by_letter(item["Choice"], item["Answer"]),
            video=place(root, *(f"{d}/{video}/{video}_video.mp4" for d in ("Videos", "videos"))),
            groups={name: item.get(name) for name in names},
        )


def av_counting(root, reference=False):
    """CG-AV-Counting: over the whole video ("long"), or in the reference clip around the clues."""
    for i, (_, item) in enumerate(annotations(root, "cg-av-counting.json")):
        video = place(root, *(f"{d}/{item['video']}" for d in ("cg_videos_720p", "videos")))
        if reference:
            start, end = item["query_interval"]
            video = f"ref_videos/{Path(item['video']).stem}_{start:.2f}_{end:.2f}.mp4"
        yield dict(
            prompt_id=item.get("index", i),
            question=item["question"],
            answer=item["answer"],
            answer_type="number",
            scoring="count",
            video=video,
            groups={name: item.get(name) for name in ("category", "type")},
        )


def av_odyssey(root):
    """Media stand where the question or an option names them: [audio1], [img2], [video1]."""
    files = annotations(root, "av_odyssey.json", "av_odyssey.jsonl", "*.parquet", "data/*.parquet")
    for _, item in files:
        paths = {kind: item[f"{kind}_path"] or [] for kind in ("image", "video", "audio")}
        sounds, videos = paths["audio"], paths["video"]
        yield dict(
            prompt_id=item["question_id"],
            question=item["question"],
            **by_letter(item["options"], item["answer"]),
            images=paths["image"],
            video=videos[0] if len(videos) == 1 else videos or None,  # several: told as a bad row
            audio=sounds[0] if len(sounds) == 1 else sounds or None,
            inline=True,
            groups={"subfield": item.get("subfield"), "task": item.get("question_type_id")},
        )


def worldsense(root):
    for _, (video, about) in annotations(root, "worldsense_qa.json"):
        for name, task in about.items():
            if re.fullmatch(r"task\d+", name):
                groups = {"domain": about.get("domain"), "task domain": task.get("task_domain")}
                yield dict(
                    prompt_id=f"{video}-{name}",
                    question=task["question"],
                    **by_letter(task["candidates"], task["answer"]),
                    video=video_file(root, video, "videos", "."),
                    groups=groups | {"task type": task.get("task_type")},
                )


def intentbench(root):
    kinds = {"multiple choice": "choice", "emer_ov_mc": "multi", "judge": "yesno"}
    for i, (_, item) in enumerate(annotations(root, "qa.json")):
        kind, file = item["problem_type"], item.get("video") or item["path"]
        answer = item["solution"] if item.get("answer") is None else item["answer"]
        yield dict(
            prompt_id=next((item[k] for k in ("qid", "Question id") if item.get(k) is not None), i),
            question=item["problem"],
            options=item["options"] if kind != "judge" else None,
            answer=re.sub(r"</?answer>", "", str(answer)).strip(),
            answer_type=kinds.get(kind, kind),
            scoring="f1" if kind == "emer_ov_mc" else "exact",
            video=place(root, f"videos/{file}", file),
            groups={"problem_type": kind},
        )


# ---- video understanding -----------------------------------------------------------------------

MVBENCH = {  # task -> where its clips lie; the second form is that of the dataset's archives
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


def mvbench(root):
    for file, item in annotations(root, "json/*.json"):
        task = file.stem
        folder = MVBENCH.get(task, task)
        head, _, tail = folder.partition("/")
        roots = [f"video/{folder}", f"video/{head}/{folder}", f"video/data0613/{folder}"]
        media = place(root, *(f"{d}/{item['video']}" for d in roots))
        row = dict(
            prompt_id=f"{task}-{Path(item['video']).stem}",
            question=item["question"],
            **by_text(item["candidates"], item["answer"]),
            video=media,
            groups={"task": task},
        )
        if item.get("start") is not None:
            row |= dict(start=float(item["start"]), end=float(item["end"]))
        inside = not Path(item["video"]).is_absolute() and ".." not in Path(item["video"]).parts
        if inside and os.path.isdir(Path(root) / media):  # TVQA is published as frames, 3 a second
            frames = sorted(p.name for p in (Path(root) / media).iterdir())
            first, last = (
                round(3 * row.pop(k, d)) for k, d in (("start", 0), ("end", len(frames)))
            )
            frames = frames[first : max(last, first + 1)]
            kept = frames[:: -(-len(frames) // 32) or 1]  # at most 32 pictures
            row |= dict(video=None, images=[f"{media}/{name}" for name in kept])
        yield row


def video_mme(root):
    for _, item in annotations(root, "videomme/*.parquet", "*.parquet", "videomme*.json*"):
        yield dict(
            prompt_id=item["question_id"],
            question=item["question"],
            **by_letter(item["options"], item["answer"]),
            video=video_file(root, item["videoID"], "data", "videos", "."),
            groups={k: item.get(k) for k in ("duration", "domain", "sub_category", "task_type")},
        )


def lvbench(root):
    for _, about in annotations(root, "video_info.meta.jsonl", "data/video_info.meta.jsonl"):
        for item in about["qa"]:
            question, options = cut_options(item["question"])
            yield dict(
                prompt_id=f"{about['key']}-{item['uid']}",
                question=question,
                **by_letter(options, item["answer"]),
                video=video_file(root, about["key"], "all_videos", "videos", "."),
                groups={
                    "question type": item.get("question_type"),
                    "video type": about.get("type"),
                },
            )


def video_holmes(root):
    for _, item in annotations(root, "test_Video-Holmes.json"):
        yield dict(
            prompt_id=f"{item['video ID']}-{item['Question ID']}",
            question=item["Question"],
            **by_letter([item["Options"][k] for k in sorted(item["Options"])], item["Answer"]),
            video=video_file(root, item["video ID"], "videos", "videos_cropped"),
            groups={"Question Type": item.get("Question Type")},
        )


def mmvu(root):
    for _, item in annotations(root, "validation.json", "data/validation.json"):
        asked = dict(answer=item["answer"], answer_type="text", scoring="open")
        if item["question_type"] == "multiple-choice":
            asked = by_key(item["choices"], item["answer"])
        yield dict(
            prompt_id=item["id"],
            question=item["question"],
            **asked,
            video=item["video"].partition("/resolve/main/")[2] or item["video"],
            groups={
                "subject": (item.get("metadata") or {}).get("subject"),
                "type": item["question_type"],
            },
        )


def tomato(root):
    for file, (number, item) in annotations(root, "data/*.json"):
        yield dict(
            prompt_id=f"{file.stem}-{number}",
            question=item["question"],
            **certain(item["options"], int(item["answer"])),  # an index from 0
            video=f"videos/{item['demonstration_type']}/{item['key']}.mp4",
            groups={"reason": file.stem, "demonstration": item["demonstration_type"]},
        )


# ---- video reasoning ---------------------------------------------------------------------------

MMMU = {  # discipline, as the archives are called -> its subjects
    "Art": "Art Art_Theory Design Music",
    "Science": "Biology Chemistry Geography Math Physics",
    "Humanities": "History Literature Sociology Psychology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
    "Business": "Accounting Economics Finance Manage Marketing",
}  # the others: Medicine


def video_mmmu(root):
    """Adaptation asks about a picture besides the video: images/ID.png, or inside the parquet."""
    disciplines = {subject: name for name, held in MMMU.items() for subject in held.split()}
    for track in ("Perception", "Comprehension", "Adaptation"):
        files = (f"{track}/**/*.parquet", f"{track}/*.json*", f"{track}.json*")
        for _, item in annotations(root, *files):
            discipline = disciplines.get("_".join(item["id"].split("_")[1:-1]), "Medicine")
            asked = dict(answer=item["answer"], answer_type="text", scoring="open")
            if item.get("options"):
                asked = by_letter(item["options"], item["answer"])
            elif re.fullmatch(r"-?[\d,]*\.?\d+", str(item["answer"]).strip()):
                asked |= dict(answer_type="number", scoring="rounded")
            yield dict(
                prompt_id=f"{track}-{item['id']}",
                question=item["question"],
                **asked,
                video=video_file(root, item["id"], discipline, f"videos/{discipline}", "videos"),
                images=[unpacked(root, item)] if track == "Adaptation" else [],
                groups={"track": track, "discipline": discipline},
            )


def unpacked(root, item):
    """The path of a picture; one that lies in the annotations themselves is written there."""
    picture, path = item.get("image"), f"images/{item['id']}.png"
    whole = Path(root) / path
    strange = "\0" in path or len(path.encode()) > 200
    if strange or whole.parent != Path(root) / "images":  # it would be written anywhere
        raise BadRow(f"id {item['id']!r:.60} is no file name: fetch the annotations again")
    if isinstance(picture, dict) and picture.get("bytes") and not os.path.exists(whole):
        try:
            whole.parent.mkdir(exist_ok=True)
            part = whole.with_name(f"{whole.name}.{os.getpid()}.part")  # every rank writes it
            part.write_bytes(picture["bytes"])
            os.replace(part, whole)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise BadRow(f"{whole} cannot be written ({error.strerror}): mend the folder") from None
    return path


VSI_SHARES = {f"object_rel_direction_{level}": 1 / 3 for level in ("easy", "medium", "hard")}


def vsi_bench(root):
    for _, item in annotations(root, "test.jsonl", "test*.parquet"):
        asked = dict(answer=item["ground_truth"], answer_type="number", scoring="mra")
        if item.get("options"):
            asked = by_letter(item["options"], item["ground_truth"])
        yield dict(
            prompt_id=item["id"],
            question=item["question"],
            **asked,
            video=f"{item['dataset']}/{item['scene_name']}.mp4",
            groups={"question type": item.get("question_type"), "dataset": item["dataset"]},
        )


def video_tt(root):
    """The split of choices is scored; the open-ended ones need a judge."""
    for file, item in annotations(root, "data/test*.parquet", "test*.json*", "data/test*.json*"):
        split = re.sub(r"-\d+-of-\d+$", "", file.stem)
        question, options = cut_options(item["question"])
        options = list(item.get("options") or options)
        asked = dict(answer=item["answer"], answer_type="text", scoring="open")
        if options:
            asked = by_letter(options, item["answer"])
        yield dict(
            prompt_id=f"{split}-{item['question_id']}",
            question=question,
            **asked,
            video=video_file(root, item["video_id"], "Benchmark-AllVideos-LQ", "video", "videos"),
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
    -> the folder that the paths are relative to, the rows of a benchmark with ids that are unique.

    root     folder of the benchmark, or one that holds a folder of its name
    raises   BadRow   there are no annotations, or not of the published form
    """
    known, home = BENCHMARKS[name], Path(root) / name.removesuffix("-ref")
    folder = home if home.is_dir() else Path(root)
    where = f"{name} is published as {known.source}: put it there as it is, archives unpacked"
    rows, seen = [], set()
    try:
        for row in known.rows(folder):
            own = row["prompt_id"] = f"{name}-{row['prompt_id']}"
            told = {k: v if v or v == 0 else UNLABELLED for k, v in row["groups"].items()}
            row["groups"] = told
            count = 1
            while row["prompt_id"] in seen:
                count += 1
                row["prompt_id"] = f"{own}-{count}"
            seen.add(row["prompt_id"])
            rows.append(row)
    except BadRow as problem:
        raise BadRow(f"{problem}; {where}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        got = f"{type(error).__name__} {error}"
        raise BadRow(f"{folder}: item {len(rows)} is not as published ({got}); {where}") from None
    if not rows:
        raise BadRow(f"{folder} has annotations without a question; {where}")
    return folder, rows
