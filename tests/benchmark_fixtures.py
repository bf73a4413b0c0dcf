"""
Small folders in the true published form of each benchmark, with values of our own and real media,
and replies of a model to every question. EXPECTED holds the scores worked out by hand.
"""

import json
import shutil
import wave

import av
import numpy as np
import pytest
import torch
from torchvision.io import write_jpeg, write_png

from data import toy_clips

REPLIES = {}  # question -> what the model says to it


def tagged(answer):
    return f"<think>a look</think><answer>{answer}</answer>"


def ask(question, reply):
    """The question, its reply noted: tagged, or as it is if it begins with a bar."""
    REPLIES[question] = reply[1:] if reply.startswith("|") else tagged(reply)
    return question


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """-> put(path, kind): a real file of that kind."""
    store = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    seconds = [([("left", "red", "circle")], "low"), ([("right", "blue", "square")], "high")]
    toy_clips.write_clip(store / "film.mp4", seconds, rng)
    with av.open(str(store / "silent.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"preset": "ultrafast"})
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        for shapes, _ in seconds * 4:
            image = av.VideoFrame.from_ndarray(toy_clips.draw_frame(shapes, rng), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    with wave.open(str(store / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(16000) / 8)).astype(np.int16).tobytes())
    picture = torch.randint(0, 255, (3, 56, 56), dtype=torch.uint8)
    write_png(picture, str(store / "picture.png"))
    write_jpeg(picture, str(store / "picture.jpg"))
    kinds = dict(
        film="film.mp4",
        silent="silent.mp4",
        sound="sound.wav",
        picture="picture.png",
        photo="picture.jpg",
    )

    def put(path, kind):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(store / kinds[kind], path)

    return put


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def dump_lines(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def dump_table(folder, parquet, lines, items):
    """As parquet, which is how it is published, where it can be written; else the same as JSONL."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        dump_lines(folder / lines, items)
    else:
        (folder / parquet).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), folder / parquet)


LETTERED = ["A. a dog", "B. a cat", "C. a bell", "D. rain"]
PLAIN = ["a dog", "a cat", "a bell", "rain"]


def omnibench(root, put):
    def item(index, task, question, answer, reply):
        put(root / f"mm_data/image/{index}.png", "picture")
        put(root / f"mm_data/audio/{index}.wav", "sound")
        return {
            "index": index,
            "task type": task,
            "audio type": "sound event",
            "question": ask(question, reply),
            "options": PLAIN,
            "answer": answer,
            "audio_path": f"{index}.wav",
            "image_path": f"{index}.png",
            "audio content": "",
            "image content": "",
        }

    dump_lines(
        root / "dataset/batch-5_1142_20240817.jsonl",
        [
            item(0, "Object", "omnibench: what barks?", "a dog", "A"),
            item(1, "Object", "omnibench: what rings?", "a bell", "rain"),
            item(2, "Plot", "omnibench: what falls?", "rain", "rain"),
        ],
    )


def daily_omni(root, put):
    def item(video, kind, length, question, answer, reply):
        put(root / f"Videos/{video}/{video}_video.mp4", "film")
        return {
            "Question": ask(question, reply),
            "Choice": LETTERED,
            "Answer": answer,
            "video_id": video,
            "Type": kind,
            "content_parent_category": "Life",
            "content_fine_category": "Pets",
            "video_category": "Howto & Style",
            "video_duration": length,
        }

    dump(
        root / "qa.json",
        [
            item("v1", "Inference", "30s", "daily: who is first?", "B", "B"),
            item("v1", "Inference", "30s", "daily: who is second?", "C", "(C) a bell"),
            item("v2", "Reasoning", "60s", "daily: who is third?", "D", "A or D"),
            item("v2", "Reasoning", "60s", "daily: who is last?", "A", "|The answer is A."),
        ],
    )


def av_counting(root, put):
    def item(index, question, answer, reply):
        put(root / "cg_videos_720p/c.mp4", "film")
        put(root / "ref_videos/c_0.00_1.50.mp4", "film")
        return dict(
            index=index,
            video="c.mp4",
            question=ask(question, reply),
            answer=answer,
            category="event",
            type="AV",
            query_interval=[0.0, 1.5],
            clue=[dict(start=0.1, end=0.4)],
        )

    dump(
        root / "cg-av-counting.json",
        [
            item(0, "count: barks", 3, "3"),
            item(1, "count: rings", 5, "six"),
            item(2, "count: steps", 2, "two or three"),
            item(3, "count: drops", 2, "300"),
        ],
    )


def av_odyssey(root, put):
    def item(number, question, options, answer, reply, image=(), video=(), audio=()):
        for path, kind in [
            *((p, "photo") for p in image),
            *((p, "film") for p in video),
            *((p, "sound") for p in audio),
        ]:
            put(root / path, kind)
        return dict(
            question_id=f"{number}_0",
            question_type_id=number,
            question=ask(question, reply),
            options=options,
            answer=answer,
            subfield="Timbre" if number < 3 else "Space",
            data_type="video" if video else "image",
            image_path=list(image) or None,
            video_path=list(video) or None,
            audio_path=list(audio),
        )

    named = [f"{letter}. [audio{i}]" for i, letter in enumerate("ABCD", 1)]
    dump(
        root / "av_odyssey.json",
        [
            item(
                1,
                "odyssey: which one sounds as [audio1] in [img1]?",
                LETTERED,
                "B",
                "B",
                image=["data/1.jpg"],
                audio=["data/1.wav"],
            ),
            item(
                2,
                "odyssey: which sound fits [img1]?",
                named,
                "C",
                "C",
                image=["data/2.jpg"],
                audio=[f"data/2_{i}.wav" for i in range(4)],
            ),
            item(
                3,
                "odyssey: is [audio1] in [video1]?",
                LETTERED,
                "A",
                "D",
                video=["data/3.mp4"],
                audio=["data/3.wav"],
            ),
        ],
    )


def worldsense(root, put):
    def task(question, answer, domain, reply):
        return dict(
            task_domain=domain,
            task_type=f"{domain} type",
            question=ask(question, reply),
            answer=answer,
            candidates=LETTERED,
        )

    put(root / "videos/w1.mp4", "film")
    put(root / "videos/w2.mp4", "silent")
    about = dict(sub_category="x", duration="<1min", audio_class=["Speech"], video_caption="")
    dump(
        root / "worldsense_qa.json",
        {
            "w1": dict(
                about,
                domain="Games",
                task0=task("world: one?", "A", "Recognition", "A"),
                task1=task("world: two?", "D", "Reasoning", "D. rain"),
            ),
            "w2": dict(about, domain="Music", task0=task("world: three?", "C", "Recognition", "B")),
        },
    )


def intentbench(root, put):
    def item(number, kind, question, options, answer, reply):
        put(root / f"videos/i{number}.mp4", "film")
        return dict(
            qid=number,
            problem=ask(question, reply),
            problem_type=kind,
            options=options,
            answer=answer,
            video=f"i{number}.mp4",
            data_type="video",
        )

    dump(
        root / "qa.json",
        [
            item(0, "multiple choice", "intent: why?", LETTERED, "B", "B"),
            item(1, "emer_ov_mc", "intent: which feelings?", str(LETTERED), "A,C", "A, B"),
            item(2, "judge", "intent: is she lying?", None, "Yes", "yes, she is"),
            item(3, "judge", "intent: is he lying?", None, "No", "Yes"),
        ],
    )


def mvbench(root, put):
    def item(video, question, answer, reply, **more):
        return dict(
            video=video, question=ask(question, reply), candidates=PLAIN, answer=answer, **more
        )

    put(root / "video/star/Charades_v1_480/s.mp4", "film")
    put(root / "video/clevrer/clevrer/video_validation/e.mp4", "silent")  # as the archives unpack
    for i in range(6):
        put(root / f"video/tvqa/frames_fps3_hq/show/{i + 1:05d}.jpg", "photo")
    dump(
        root / "json/action_sequence.json",
        [
            item("s.mp4", "mv: first?", "a dog", "A", start=0.0, end=1.0),
            item("s.mp4", "mv: then?", "a cat", "B", start=1.0, end=2.0),
            item("s.mp4", "mv: last?", "rain", "A", start=0.5, end=2.3),
        ],
    )
    dump(
        root / "json/object_existence.json",
        [item("e.mp4", "mv: what is there?", "a bell", "a cat")],
    )
    dump(
        root / "json/episodic_reasoning.json",
        [item("show", "mv: who said it?", "a cat", "B", start=0.3, end=1.4)],
    )


def video_mme(root, put):
    def item(number, video, length, question, answer, reply):
        put(root / f"data/{video}.mp4", "film")
        return dict(
            video_id=video[:3],
            duration=length,
            domain="Knowledge",
            sub_category="Law",
            url="https://example.org",
            videoID=video,
            question_id=f"001-{number}",
            task_type="Counting Problem",
            question=ask(question, reply),
            options=LETTERED,
            answer=answer,
        )

    dump_table(
        root,
        "videomme/test-00000-of-00001.parquet",
        "videomme.jsonl",
        [
            item(1, "fFjv", "short", "mme: one?", "C", "C."),
            item(2, "fFjv", "short", "mme: two?", "D", "**D**"),
            item(3, "N1cd", "long", "mme: three?", "A", "I think it is a cat"),
        ],
    )


def lvbench(root, put):
    put(root / "all_videos/Cm73.mp4", "film")
    options = "\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633"
    ask("lvbench: which year?", "(A) 1636")
    ask("lvbench: which year then?", "1366")
    qa = dict(time_reference="00:01-00:02", answer="A")
    dump_lines(
        root / "video_info.meta.jsonl",
        [
            dict(
                key="Cm73",
                type="sport",
                video_info=dict(resolution="1280x720", duration_minutes=62),
                qa=[
                    dict(
                        qa,
                        uid="1",
                        question=f"lvbench: which year?{options}",
                        question_type=["event understanding", "reasoning"],
                    ),
                    dict(
                        qa,
                        uid="2",
                        question=f"lvbench: which year then?{options}",
                        question_type=["reasoning"],
                    ),
                ],
            )
        ],
    )


def video_holmes(root, put):
    def item(number, kind, question, answer, reply):
        put(root / "videos/RSmj.mp4", "film")
        options = dict(zip("ABCDEF", ["Cleaners", "Siblings", "A", "B", "Officers", "Nobody"]))
        return {
            "video ID": "RSmj",
            "Question ID": number,
            "Question Type": kind,
            "Question": ask(question, reply),
            "Options": options,
            "Answer": answer,
            "Explanation": "",
        }

    dump(
        root / "test_Video-Holmes.json",
        [
            item(1, "SR", "holmes: who are they?", "F", "F"),
            item(2, "SR", "holmes: who is it?", "E", "Officers"),
            item(3, "MHR", "holmes: what is on the card?", "C", "A"),  # an option that is a letter
            item(4, "MHR", "holmes: what is on the wall?", "A", "E"),
        ],
    )


def mmvu(root, put):
    def item(number, kind, choices, question, answer, reply):
        put(root / "videos/Art/0.mp4", "film")
        site = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main"
        return dict(
            id=f"validation_{number}",
            video=f"{site}/videos/Art/0.mp4",
            youtube_url="",
            question_type=kind,
            question=ask(question, reply),
            answer=answer,
            choices=dict(zip("ABCDE", choices)),
            metadata=dict(subject="Art", textbook="", rationale="", knowledge=[]),
        )

    dump(
        root / "validation.json",
        [
            item(0, "multiple-choice", [*PLAIN, "wind"], "mmvu: what moves?", "E", "E"),
            item(1, "multiple-choice", [*PLAIN, ""], "mmvu: what stays?", "A", "B"),
            item(
                2, "open-ended", [""] * 5, "mmvu: which shot is it?", "Dolly Zoom", "a dolly zoom"
            ),
        ],
    )


def tomato(root, put):
    def item(options, answer, question, reply):
        put(root / "videos/human/0209-03.mp4", "silent")
        return dict(
            question=ask(question, reply),
            options=options,
            answer=answer,
            key="0209-03",
            video_source_url="",
            motion_type="count",
            demonstration_type="human",
            note="",
            variation=dict(counterfactual=0, composite=0, zoom=1, first_person=0),
        )

    numbers = ["2", "1", "3", "4", "5", "0"]
    dump(
        root / "data/count.json",
        {
            "0": item(numbers, 2, "tomato: how many?", "C"),  # the index 2 is the option "3"
            "1": item(numbers, 5, "tomato: how many squares?", "0"),
            "2": item(["1", "2", "3"], 0, "tomato: how many circles?", "C"),
        },
    )
    dump(root / "data/shape&trend.json", {"0": item(["B", "A"], 1, "tomato: which letter?", "A")})


def video_mmmu(root, put):
    def item(track, number, question, options, answer, reply):
        put(root / f"Science/dev_Biology_{number}.mp4", "film")
        more = {}
        if track == "Adaptation":
            put(root / f"images/dev_Biology_{number}.png", "picture")
            more = dict(image=dict(path=f"dev_Biology_{number}.png"))
        return dict(
            id=f"dev_Biology_{number}",
            question=ask(question, reply),
            options=options,
            answer=answer,
            qa_type="",
            link_selected="",
            question_type="multiple-choice" if options else "open",
            **more,
        )

    ten = [f"state {i}" for i in range(10)]
    tracks = {
        "Perception": [
            (1, "mmmu: what is on the board?", ten, "J", "J"),
            (2, "mmmu: what is said?", LETTERED, "B", "B"),
        ],
        "Comprehension": [(1, "mmmu: what follows?", PLAIN, "C", "A")],
        "Adaptation": [
            (1, "mmmu: how many cells?", [], "12.50", "12.499"),
            (2, "mmmu: how many more?", [], "7", "8"),
            (3, "mmmu: which law?", [], "Hardy and Weinberg", "Hardy"),
        ],
    }
    for track, items in tracks.items():
        items = [item(track, *words) for words in items]
        dump_table(root, f"{track}/test-00000-of-00001.parquet", f"{track}/test.jsonl", items)


def vsi_bench(root, put):
    def item(number, kind, question, options, truth, reply):
        put(root / "scannet/scene0011_00.mp4", "silent")
        return dict(
            id=number,
            dataset="scannet",
            scene_name="scene0011_00",
            question_type=kind,
            question=ask(question, reply),
            ground_truth=truth,
            options=options,
        )

    two = ["A. left", "B. right"]
    dump_lines(
        root / "test.jsonl",
        [
            item(0, "object_counting", "vsi: how many chairs?", None, "4", "4"),
            item(1, "object_abs_distance", "vsi: how far?", None, "2.0", "1.45 meters"),  # .275 off
            item(2, "object_rel_direction_easy", "vsi: easy?", two, "A", "A"),
            item(3, "object_rel_direction_medium", "vsi: medium?", two, "B", "A"),
            item(4, "object_rel_direction_hard", "vsi: hard?", two, "B", "right"),
            item(5, "route_planning", "vsi: which way?", two, "A", "B"),
        ],
    )


def video_tt(root, put):
    def item(number, question, answer, reply, options=""):
        put(root / "Benchmark-AllVideos-LQ/t1.mp4", "film")
        return dict(
            question_id=number,
            video_id="t1",
            duration=60,
            question=ask(question, reply) + options,
            question_prompt="",
            capability="Plot Attribute",
            answer=answer,
        )

    options = "\nA. Red\nB. Blue\nC. Green"
    dump_table(
        root,
        "data/test-00000-of-00001.parquet",
        "data/test.jsonl",
        [
            item("1", "tt: which color?", "B", "Blue", options),
            item("2", "tt: which color then?", "C", "A", options),
        ],
    )
    dump_table(
        root,
        "data/test_all-00000-of-00001.parquet",
        "data/test_all.jsonl",
        [
            item("1", "tt: why?", "It was late", "it was late"),
        ],
    )


WRITERS = {
    "omnibench": omnibench,
    "daily-omni": daily_omni,
    "av-counting": av_counting,
    "av-odyssey": av_odyssey,
    "worldsense": worldsense,
    "intentbench": intentbench,
    "mvbench": mvbench,
    "video-mme": video_mme,
    "lvbench": lvbench,
    "video-holmes": video_holmes,
    "mmvu": mmvu,
    "tomato": tomato,
    "video-mmmu": video_mmmu,
    "vsi-bench": vsi_bench,
    "video-tt": video_tt,
}

# name: items, not scored, score, parts of what else is reported
EXPECTED = {
    "omnibench": (3, 0, 2 / 3, {"task type": {"Object": 1 / 2, "Plot": 1}}),
    "daily-omni": (
        4,
        0,
        3 / 4,
        {"Type": {"Inference": 1, "Reasoning": 1 / 2}, "video_duration": {"30s": 1, "60s": 1 / 2}},
    ),
    "av-counting": (4, 0, 1 / 4, {}),
    "av-counting-ref": (4, 0, 1 / 4, {}),
    "av-odyssey": (3, 0, 2 / 3, {"subfield": {"Timbre": 1, "Space": 0}}),
    "worldsense": (
        3,
        0,
        2 / 3,
        {"task domain": {"Recognition": 1 / 2, "Reasoning": 1}, "domain": {"Games": 1, "Music": 0}},
    ),
    "intentbench": (4, 0, (1 + 0.5 + 1 + 0) / 4, {"problem_type": {"emer_ov_mc": 1 / 2}}),
    # the mean of the tasks: 2/3, 0 and 1
    "mvbench": (
        5,
        0,
        5 / 9,
        {"task": {"action_sequence": 2 / 3, "object_existence": 0, "episodic_reasoning": 1}},
    ),
    "video-mme": (3, 0, 2 / 3, {"duration": {"short": 1, "long": 0}}),
    "lvbench": (2, 0, 1 / 2, {"question type": {"event understanding": 1, "reasoning": 1 / 2}}),
    "video-holmes": (4, 0, 3 / 4, {"Question Type": {"SR": 1, "MHR": 1 / 2}}),
    "mmvu": (3, 1, 1 / 2, {"subject": {"Art": 1 / 2}}),
    "tomato": (4, 0, 3 / 4, {"reason": {"count": 2 / 3, "shape&trend": 1}}),
    # the mean of the tracks: 1, 0 and 1/2 (one of three is not scored)
    "video-mmmu": (
        6,
        1,
        1 / 2,
        {"track": {"Perception": 1, "Comprehension": 0, "Adaptation": 1 / 2}},
    ),
    # the mean of four tasks: 1, 5 of 10 thresholds, (1 + 0 + 1) / 3, 0
    "vsi-bench": (6, 0, (1 + 0.5 + 2 / 3 + 0) / 4, {"question type": {"object_abs_distance": 0.5}}),
    "video-tt": (3, 1, 1 / 2, {"split": {"test": 1 / 2}}),
}


@pytest.fixture(scope="session")
def benchmark_root(tmp_path_factory, media):
    """A folder with a folder for each benchmark."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name, write in WRITERS.items():
        write(root / name, media)
    return root
