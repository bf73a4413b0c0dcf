"""
`prepare.py rows`: every format, from a small invented file with true media to steps of training; what is
left out, and that the report adds up.

    python -m pytest tests/test_converters.py
"""

import base64
import csv
import gzip
import json
import math

import numpy as np
import pytest
import torch
from benchmark_fixtures import media  # noqa: F401
from conftest import launch
from media_files import write
from torchvision.io import write_png

from answers import normalize_answer, option_table
from data import converters, readers
from data.clips import BadRow
from data.rows import normalize_row

R1 = dict(
    problem_id=7,
    problem="Which shape is red?",
    problem_type="multiple choice",
    data_type="video",
    options=["A. circle", "B. square"],
    solution="<answer>A</answer>",
    path="./Set/a.mp4",
    data_source="Set",
)
R1_SAID = "<think>I look.</think><answer>B</answer>"
TALK = [dict(role="system", content="Be kind."), dict(role="user", content="<video>Is it red?")]


def chat_turns(question, said, names=("role", "content"), roles=("user", "assistant")):
    role, content = names
    return [{role: roles[0], content: question}, {role: roles[1], content: said}]


CASES = {  # name -> (records, media: path -> kind, stage, rows that they make: some of their fields)
    "video-r1": (
        [
            R1,
            R1 | dict(problem_id=8, problem_type="OCR", options=[], solution="<answer>NO</answer>"),
            R1
            | dict(
                problem_id=9,
                data_type="image",
                path="./Set/b.png",
                problem_type="free-form",
                solution="<answer>a red dot</answer>",
            ),
        ],
        {"Set/a.mp4": "film", "Set/b.png": "picture"},
        2,
        [
            dict(answer="A", answer_type="choice", use_audio="auto", prompt_id="Set-7"),
            dict(answer="NO", answer_type="ocr"),
            dict(answer="a red dot", answer_type="free-form"),
        ],
    ),
    "avqa-r1": (
        [R1 | dict(data_type="image_audio", path=dict(image="i.png", audio="s.wav"))],
        {"i.png": "picture", "s.wav": "sound"},
        2,
        [dict(answer="A", answer_type="choice")],
    ),
    "avqa": (
        [
            dict(
                id=1,
                video_name="abcdefghijk_000030",
                question_text="What barks?",
                answer=1,
                multi_choice=["cat", "dog", "car", "man"],
            )
        ],
        {"abcdefghijk_000030.mp4": "film"},
        2,
        [dict(answer="dog", options=["cat", "dog", "car", "man"], use_audio=True)],
    ),
    "music-avqa": (
        [
            dict(
                video_id="00000001",
                question_id=i,
                type="[]",
                question_content=q,
                templ_values=t,
                question_deleted=0,
                anser=a,
            )
            for i, (q, t, a) in enumerate(
                (
                    (
                        "Is the <Object> louder than the <Object>?",
                        '["electric_bass", "drum"]',
                        "no",
                    ),
                    ("How many <Object> are there?", '["piano"]', "two"),
                    ("Where is the <LL> instrument?", '["loudest"]', "middle"),
                    ("What kind of musical instrument is it?", "[]", "electric_bass"),
                )
            )
        ],
        {"00000001.mp4": "film"},
        2,
        [
            dict(
                question="Is the electric bass louder than the drum?",
                answer="no",
                answer_type="yesno",
            ),
            dict(question="How many piano are there?", answer="2", answer_type="number"),
            dict(answer="middle", options=["left", "middle", "right"]),
            dict(answer="electric bass", answer_type="choice"),
        ],
    ),
    "music-avqa-v2": (  # its added records have no question_id, some a list of values
        [
            dict(
                video_id="9G7EAFgjQyQ",
                type="[]",
                question_content=question,
                templ_values=values,
                anser="no",
            )
            for question, values in (
                ("Are there <Object> and <Object> sound? ", '["flute", "clarinet"]'),
                ("Is there a <Object> sound?", ["flute"]),
            )
        ],
        {"9G7EAFgjQyQ.mp4": "film"},
        2,
        [
            dict(question="Are there flute and clarinet sound?", answer="no", answer_type="yesno"),
            dict(prompt_id="music-9G7EAFgjQyQ-2", question="Is there a flute sound?"),
        ],
    ),
    "ave": (
        "Church bell&one&good&1&3\nBark&two&good&0&2\nBus&two&good&1&2\n",
        {"one.mp4": "film", "two.mp4": "film"},
        2,
        [{}, dict(answer="0", answer_type="number"), dict(answer="1", answer_type="number")],
    ),
    "vggsound": (
        "abcdefghijk,30,dog barking,train\nbbcdefghijk,0,church bell,test\ncccdefghijk,1,rain,train\n",
        {
            "abcdefghijk_000030.mp4": "film",
            "bbcdefghijk_000000.mp4": "film",
            "cccdefghijk_000001.mp4": "film",
        },
        2,
        [dict(answer="dog barking", answer_type="choice"), {}, {}],
    ),
    "vggsound-files": (  # its authors' data/test.csv
        'abcdefghijk_000030.mp4,dog barking\nbbcdefghijk_000000.mp4,"wind noise, storm"\n',
        {"abcdefghijk_000030.mp4": "film", "bbcdefghijk_000000.mp4": "film"},
        2,
        [
            dict(answer="dog barking", prompt_id="vgg-abcdefghijk_000030"),
            dict(answer="wind noise, storm", answer_type="choice"),
        ],
    ),
    "ms-swift": (
        [
            dict(messages=TALK, videos=["v.mp4"], solution="Yes"),
            dict(
                messages=[
                    *TALK,
                    dict(role="assistant", content="<think>I look</think><answer>no</answer>"),
                ],
                videos=["v.mp4"],
                audios=["s.wav"],
            ),
        ],
        {"v.mp4": "film", "s.wav": "sound"},
        2,
        [
            dict(question="Is it red?", answer="Yes", answer_type="yesno", use_audio="auto"),
            dict(answer="no", reasoning="I look", audio="s.wav"),
        ],
    ),
    "llama-factory": (
        [
            dict(
                conversations=chat_turns(
                    "<image>Which?\nA. red\nB. blue", "B", ("from", "value"), ("human", "gpt")
                ),
                images=["i.png"],
            )
        ],
        {"i.png": "picture"},
        1,
        [dict(question="Which?", options=["A. red", "B. blue"], answer="B", answer_type="choice")],
    ),
    "llava": (
        [
            dict(
                id="x",
                video="v.mp4",
                conversations=chat_turns(
                    "<image>\nHow many?", "3", ("from", "value"), ("human", "gpt")
                )
                + chat_turns("What color?", "red", ("from", "value"), ("human", "gpt")),
            )
        ],
        {"v.mp4": "film"},
        1,
        [
            dict(prompt_id="x-0", question="How many?", answer="3", answer_type="number"),
            dict(prompt_id="x-1", answer="red", answer_type="text"),
        ],
    ),
    "trl": (
        [
            dict(
                prompt=[
                    dict(
                        role="user",
                        content=[
                            dict(type="video", video="v.mp4"),
                            dict(type="text", text="How many?"),
                        ],
                    )
                ],
                solution="4",
            )
        ],
        {"v.mp4": "film"},
        1,
        [dict(question="How many?", answer="4", answer_type="number", video="v.mp4")],
    ),
    "verl": (
        [
            dict(
                data_source="mine",
                prompt=[dict(role="user", content="<video>What colour?")],
                videos=[dict(video="v.mp4")],
                reward_model=dict(style="rule", ground_truth="red"),
            )
        ],
        {"v.mp4": "film"},
        2,
        [dict(question="What colour?", answer="red", answer_type="text", video="v.mp4")],
    ),
    "natural": (  # no prompt_id, no answer_type
        [
            dict(question="What colour?", answer="red", video="v.mp4"),
            dict(question="Which one?", answer="B", options=["red", "blue"], image="i.png"),
            dict(question="Which?\n1. red\n2. blue", answer="2", images=["i.png"]),
        ],
        {"v.mp4": "film", "i.png": "picture"},
        2,
        [
            dict(prompt_id="in-0", answer="red", answer_type="text", use_audio="auto"),
            dict(answer="B", answer_type="choice", images=["i.png"]),
            dict(question="Which?", answer="B", options=["A. red", "B. blue"]),
        ],
    ),
    "easy-r1": (  # and open-r1, which has a solution
        [
            dict(problem="<image>Find x.", answer="3", images=["i.png"]),
            dict(
                problem="<video>Why?",
                answer="it fell",
                solution="First we see it.",
                videos=["v.mp4"],
            ),
            dict(problem="Which?\nA. red\nB. blue", solution=R1_SAID, video="v.mp4", problem_id=5),
        ],
        {"i.png": "picture", "v.mp4": "film"},
        2,
        [
            dict(question="Find x.", answer="3", answer_type="number", images=["i.png"]),
            dict(question="Why?", answer="it fell", use_audio="auto"),
            dict(prompt_id="5", answer="B", options=["A. red", "B. blue"], reasoning="I look."),
        ],
    ),
    "humanomni-v2": (
        [
            R1
            | dict(
                problem_id=None,
                problem_type="emer_ov_mc",
                answer="A,B",
                solution="<context>A</context><think>I look.</think><answer>A,B</answer>",
            )
        ],
        {"Set/a.mp4": "film"},
        2,
        [dict(prompt_id="in-0", answer="A,B", answer_type="multi", reasoning="I look.")],
    ),
}


def convert(folder, name, *more, code=0):
    return launch(
        "prepare.py", "rows", folder / name, "--out", folder / "rows.jsonl", *more, code=code
    )


def rows_in(folder, name="rows.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def report_of(folder):
    report = json.loads((folder / "rows.report.json").read_text())
    dropped = sum(part["count"] for part in report["dropped"].values())
    assert report["read"] == report["kept"] + report["held_out"] + dropped  # it adds up
    assert sum(report["answer_types"].values()) == report["kept"] + report["held_out"]
    return report


def train(toy_dir, folder, stage=2):
    """Two steps on the rows."""
    flags = (
        "--steps 2 --prompts-per-step 1 --max-new-tokens 8 --eval-every 0 --save-every 0".split()
    )
    paths = ["--model", toy_dir / "model", "--data", folder / "rows.jsonl", "--out", folder / "run"]
    launch("train_rl.py", "--stage", stage, *flags, *paths)


@pytest.mark.parametrize("name", CASES)
def test_a_format_from_its_file_to_training(toy_dir, tmp_path, media, name):  # noqa: F811
    records, files, stage, expected = CASES[name]
    for path, kind in files.items():
        media(tmp_path / path, kind)
    text = records if isinstance(records, str) else json.dumps(records)
    (tmp_path / "in.txt").write_text(text)  # told by content, not by its name
    printed = convert(tmp_path, "in.txt", "--stage", stage)
    made = rows_in(tmp_path)
    assert len(made) == len(expected) and report_of(tmp_path)["kept"] == len(made)
    for row, wanted in zip(made, expected):
        assert {key: row.get(key) for key in wanted} == wanted
        if row["answer_type"] == "choice":
            assert row["answer"] in row["options"] or row["answer"] in "ABCD"
    assert "kept" in printed
    launch("prepare.py", "check", tmp_path / "rows.jsonl")
    train(toy_dir, tmp_path, min(stage, 2))


def test_avsbench_says_where(toy_dir, tmp_path, media):  # noqa: F811
    """A mask that lies to three quarters in the left third."""
    inside = "train/dog/abc_1"
    mask = torch.zeros(1, 30, 30, dtype=torch.uint8)
    mask[:, :15, :9], mask[:, :5, 25:] = 255, 255
    for folder, kind in (("visual_frames", "picture"), ("gt_masks", "picture")):
        for i in (1, 2):
            media(tmp_path / folder / inside / f"abc_1_{i}.png", kind)
    for path in (tmp_path / "gt_masks" / inside).iterdir():
        write_png(mask, str(path))
    media(tmp_path / "audio_wav" / "train" / "dog" / "abc_1.wav", "sound")
    with open(tmp_path / "meta.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["name", "category", "split"], ["abc_1", "dog", "train"], ["x", "cat", "train"]]
        )
    convert(tmp_path, "meta.csv", "--stage", 3, "--max-bad-frac", 1)
    (row,) = rows_in(tmp_path)
    assert (
        row["answer"] == "left: dog"
        and row["answer_type"] == "location"
        and len(row["images"]) == 2
    )
    assert report_of(tmp_path)["dropped"]["masks or frames that are not there"]["count"] == 1
    launch("prepare.py", "check", tmp_path / "rows.jsonl")


def test_avsbench_semantic_names_every_source(toy_dir, tmp_path, media):  # noqa: F811
    """A dog (class 9) in the left third, a guitar (class 3) over center and right, in both frames."""
    clip = tmp_path / "v1m" / "abc_0_5000"
    mask = torch.zeros(3, 30, 30, dtype=torch.uint8)
    # a class is a colour: 9 = 001 001 is red in both groups of bits, 3 = 011 red and green in one
    mask[0, :20, :8], mask[:2, 5:9, 12:28] = 128 + 64, 128
    for i in range(2):
        media(clip / "frames" / f"{i}.jpg", "picture")
        (clip / "labels_rgb").mkdir(exist_ok=True)
        write_png(mask, str(clip / "labels_rgb" / f"{i}.png"))
    media(clip / "audio.wav", "sound")
    (tmp_path / "label2idx.json").write_text(json.dumps({"background": 0, "guitar": 3, "dog": 9}))
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        head = ["vid", "uid", "s_min", "s_max", "a_obj", "split", "label"]
        csv.writer(file).writerows([head, ["abc", "abc_0_5000", 0, 5, "", "train", "v1m"]])
    convert(tmp_path, "metadata.csv", "--stage", 3)
    (row,) = rows_in(tmp_path)
    assert row["answer"] == "left: dog | center: guitar | right: guitar" and len(row["images"]) == 2
    launch("prepare.py", "check", tmp_path / "rows.jsonl")
    train(toy_dir, tmp_path)


def test_stage_0_learns_from_reasonings(toy_dir, tmp_path, media):  # noqa: F811
    media(tmp_path / "Set" / "a.mp4", "film")
    (tmp_path / "cot.json").write_text(
        json.dumps([R1 | dict(process="<think>It is the left one.</think>")])
    )
    convert(tmp_path, "cot.json")
    assert rows_in(tmp_path)[0]["reasoning"] == "It is the left one."
    paths = ["--model", toy_dir / "model", "--data", tmp_path / "rows.jsonl"]
    flags = ["--steps", 2, "--batch-size", 1, "--save-every", 0]
    launch("train_sft.py", *paths, "--out", tmp_path / "run", *flags)


# ---- files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    records = [dict(question="Où ?", n=1), dict(question="何？", n=2)]
    lines = end.join(json.dumps(r, ensure_ascii=False) for r in records) + end
    for text in (
        lines,
        "[" + lines.replace(end, "," + end, 1) + "]",
        json.dumps(dict(data=records)),
    ):
        (tmp_path / "x").write_bytes(text.encode(encoding))
        assert list(readers.read_records(tmp_path / "x")) == records


def test_an_array_is_streamed(tmp_path, monkeypatch):
    """Pieces of every size give the same items: a cut may fall anywhere."""
    items = [dict(a="x" * n, b=[n, {"c": '"]},{'}]) for n in range(40)]
    (tmp_path / "x.json").write_text(json.dumps(items))
    for chunk in (1, 2, 7, 100, 5000):
        monkeypatch.setattr(readers, "CHUNK", chunk)
        assert list(readers.read_records(tmp_path / "x.json")) == items
    (tmp_path / "x.json").write_text(json.dumps(items)[:2000])
    *whole, problem = readers.read_records(tmp_path / "x.json")
    assert whole == items[: len(whole)] and "it and all that follows is lost" in str(problem)


def test_compressed_files_and_arrow(tmp_path):
    """.gz of lines, an array and a table; what datasets.save_to_disk writes."""
    records = [dict(a="1", b="x"), dict(a="2", b="y")]
    lines = "\n".join(map(json.dumps, records))
    for text in (lines, json.dumps(records), "a,b\n1,x\n2,y\n"):
        (tmp_path / "x.gz").write_bytes(gzip.compress(text.encode()))
        assert list(readers.read_records(tmp_path / "x.gz")) == records
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(records)
    for new in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        with new(str(tmp_path / "x.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert list(readers.read_records(tmp_path / "x.arrow")) == records


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_of_a_table(tmp_path, separator):
    rows = [["id", "question"], ["1", "What, now; then?"], ["2", 'a "b"']]
    with open(tmp_path / "x.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    records = list(readers.read_records(tmp_path / "x.csv"))
    assert records == [dict(zip(rows[0], row)) for row in rows[1:]]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"just a text\nof two lines\n", b"\x89PNG\r\n\x1a\n\xff\xfe"]
)
def test_a_file_that_is_no_data_is_named(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    (problem,) = readers.read_records(tmp_path / "x")
    assert isinstance(problem, BadRow) and "x" in str(problem)


def test_parquet_with_media_inside(toy_dir, tmp_path, media):  # noqa: F811
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    media(tmp_path / "p.png", "picture")
    record = R1 | dict(
        data_type="image",
        path=dict(image=dict(bytes=(tmp_path / "p.png").read_bytes(), path="p.png")),
    )
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "x.parquet")
    (tmp_path / "p.png").unlink()
    convert(tmp_path, "x.parquet")
    (row,) = rows_in(tmp_path)
    assert row["images"][0].startswith("media/") and (tmp_path / row["images"][0]).is_file()


# ---- what is left out


def test_what_is_left_out_is_named_and_counted(tmp_path, media):  # noqa: F811
    media(tmp_path / "Set" / "a.mp4", "film")
    music = dict(
        video_id="1",
        question_id=1,
        question_content="Is the <Object> seen?",
        templ_values="[]",
        anser="yes",
    )
    records = [
        R1,
        R1 | dict(problem="The same clip, another question?"),
        dict(R1),
        R1 | dict(problem_type="poem"),
        R1 | dict(problem_id=3, solution="<answer>E</answer>"),
        R1 | dict(problem_id=4, path="./Set/none.mp4"),
        music,
        music | dict(question_deleted=1),
        dict(what="?"),
        dict(messages=[*TALK, *TALK], videos=["Set/a.mp4"], answer="yes"),
        R1 | dict(problem_id=5, path="https://x.org/a.mp4"),
        R1 | dict(problem_id=6, path="../../etc/x.mp4"),
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{broken", "[1]"]) + "\n")
    line = convert(tmp_path, "in.jsonl", code=1)
    assert "over --max-bad-frac" in line and "Traceback" not in line
    assert not (tmp_path / "rows.jsonl").exists() and not list(tmp_path.glob("*.part*"))
    convert(tmp_path, "in.jsonl", "--max-bad-frac", 1)
    report = report_of(tmp_path)
    assert report["read"] == 14 and report["kept"] == 2
    assert {reason: part["count"] for reason, part in report["dropped"].items()} == {
        "media missing": 3,
        "unreadable": 2,
        "the same question about the same clip": 1,
        "unknown problem type": 1,
        "breaks the format": 1,
        "a template with other values than slots": 1,
        "deleted by its authors": 1,
        "a form that is not known": 1,
        "several turns": 1,
    }
    assert "keys: what" in report["dropped"]["a form that is not known"]["example"]
    ids = [row["prompt_id"] for row in rows_in(tmp_path)]
    assert ids == ["Set-7", "Set-7-2"]  # ids repeat in the source, and are kept apart
    assert "add --force" in convert(tmp_path, "in.jsonl", code=1)


USELESS = {  # file -> its content, and what the line has to name
    "unknown.json": (json.dumps([dict(video_id="a", task="t", text="?")] * 3), "--map"),
    "benchmark.json": (
        json.dumps([dict(Question="?", Choice=["A"], Answer="A", video_id="x")]),
        "eval.py --benchmark daily-omni",
    ),
    "empty.json": ("", "empty"),
    "list.json": ("[]", "no record"),
    "text.txt": ("hello\nworld\n", "JSONL"),
    "turns.jsonl": (
        json.dumps(dict(messages=TALK + TALK, videos=["v.mp4"], answer="no")),
        "several turns",
    ),
    "box.jsonl": (
        json.dumps(
            dict(problem="<image>Where?", image="i.png", solution=[74.0, 302.0, 181.0, 500.0])
        ),
        "no answer_type scores boxes",
    ),
    "no_answer.jsonl": (json.dumps(dict(messages=TALK, videos=["v.mp4"])), "no answer"),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_file_of_which_nothing_can_be_used_is_an_error(tmp_path, name):
    content, words = USELESS[name]
    (tmp_path / name).write_text(content)
    line = convert(tmp_path, name, "--max-bad-frac", 1, code=1)
    assert words in line and "Traceback" not in line and len(line.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is written


def test_an_unknown_form_is_named_with_all_its_keys(tmp_path):
    keys = [f"column_{i}" for i in range(30)]
    (tmp_path / "in.json").write_text(json.dumps([dict.fromkeys(keys, "x")]))
    line = convert(tmp_path, "in.json", code=1)
    assert all(key in line for key in keys)
    assert all(name in line for name in converters.FORMATS)


def test_media_in_another_folder_than_the_records(tmp_path, media):  # noqa: F811
    media(tmp_path / "videos" / "v.mp4", "film")
    (tmp_path / "records").mkdir()
    record = dict(question="How many?", answer="3", video="v.mp4")
    (tmp_path / "records" / "in.json").write_text(json.dumps([record]))
    convert(tmp_path, "records/in.json", "--media", tmp_path / "videos")
    (row,) = rows_in(tmp_path)
    assert row["video"] == "videos/v.mp4"


def test_columns_of_a_form_of_ones_own(tmp_path, media):  # noqa: F811
    media(tmp_path / "v.mp4", "film")
    table = "file,text,A,B,C,correct\nv.mp4,What colour?,red,blue,green,B\n"
    (tmp_path / "in.csv").write_text(table)
    convert(tmp_path, "in.csv", "--map", "question=text,answer=correct,video=file,options=A+B+C")
    (row,) = rows_in(tmp_path)
    assert row["options"] == ["red", "blue", "green"] and row["answer_type"] == "choice"
    assert (row["answer"], row["video"], row["question"]) == ("B", "v.mp4", "What colour?")
    (tmp_path / "in.csv").write_text(table.replace("green,B", "green,1"))  # counted from 0
    mapping = "question=text,answer=correct,video=file,options=A+B+C"
    convert(tmp_path, "in.csv", "--force", "--map", mapping)
    (row,) = rows_in(tmp_path)
    assert (row["answer"], row["answer_type"]) == ("B", "choice")
    assert report_of(tmp_path)["changed"]["an answer is the number of an option, counted from 0"]
    nested = dict(q="How many?", meta=dict(truth=[3]), clips=[dict(path="v.mp4")])
    (tmp_path / "in.json").write_text(json.dumps([nested]))
    mapping = "question=q,answer=meta.truth.0,video=clips.0.path"
    convert(tmp_path, "in.json", "--map", mapping, "--force")
    (row,) = rows_in(tmp_path)
    assert (row["answer"], row["answer_type"], row["video"]) == ("3", "number", "v.mp4")
    for mapping, words in (
        ("question=q,answer=none,video=q", "none"),
        ("question=q", "answer"),
        ("queston=q,answer=q", "queston"),
    ):
        line = convert(tmp_path, "in.json", "--map", mapping, "--force", code=1)
        assert "--map" in line and words in line


def test_a_table_holds_booleans_and_seconds(tmp_path, media):  # noqa: F811
    media(tmp_path / "v.mp4", "film")
    table = (
        "prompt_id,video,question,answer,answer_type,options,use_audio,start,end\n"
        'a,v.mp4,Which?,red,choice,"[""red"", ""blue""]",true,0:00:00,0:01.5\n'
        "b,v.mp4,How many?,2,number,,FALSE,,\n"
        "c,v.mp4,How many now?,2,number,,auto,1,\n"
        "d,v.mp4,How many then?,2,number,,maybe,soon,\n"
    )
    (tmp_path / "in.csv").write_text(table)
    convert(tmp_path, "in.csv", "--max-bad-frac", 0.3)
    a, b, c = rows_in(tmp_path)
    assert (a["use_audio"], a["start"], a["end"], a["options"]) == (True, 0, 1.5, ["red", "blue"])
    assert b["use_audio"] is False and (c["use_audio"], c["start"]) == ("auto", 1)
    dropped = report_of(tmp_path)["dropped"]["breaks the format"]
    assert "'maybe'" in dropped["example"]


def test_sound_is_heard_where_there_is_a_track(toy_dir, tmp_path, media):  # noqa: F811
    """use_audio is "auto" unless --stage is 0 or 1; --check-media decides it for each clip."""
    media(tmp_path / "heard.mp4", "film")
    write(tmp_path / "mute.mp4", seconds=1.0)
    records = [
        R1 | dict(problem_id=i, path=name) for i, name in enumerate(("heard.mp4", "mute.mp4"))
    ]
    (tmp_path / "in.json").write_text(json.dumps(records))
    for flags, expected in (
        ([], ["auto", "auto"]),
        (["--stage", 2], ["auto", "auto"]),
        (["--stage", 1], [False, False]),
        (["--stage", 2, "--use-audio", "true"], [True, True]),
    ):
        convert(tmp_path, "in.json", *flags, "--force")
        assert [row["use_audio"] for row in rows_in(tmp_path)] == expected
    convert(tmp_path, "in.json", "--force")
    assert report_of(tmp_path)["use_audio_auto"] == 2
    launch("prepare.py", "check", tmp_path / "rows.jsonl")
    train(toy_dir, tmp_path)
    convert(tmp_path, "in.json", "--check-media", "--force")
    assert [row["use_audio"] for row in rows_in(tmp_path)] == [True, False]
    report = report_of(tmp_path)
    assert report["kept"] == 2 and report["silent_videos"] == 1


def test_what_tables_write_for_nothing_is_nothing(toy_dir, tmp_path, media):  # noqa: F811
    """pandas writes NaN, datasets fill up the options that other rows have."""
    media(tmp_path / "v.mp4", "film")
    nothing = dict.fromkeys(("audio", "image", "start", "end", "hint"), math.nan)
    options = [
        dict(A="red", B="blue", C=None, D=None),
        dict(A="red", B="blue", C=math.nan),
        ["red", "blue", None, ""],
        math.nan,
    ]
    records = [dict(question="How?", answer="fast", video="v.mp4") | nothing]
    for i, given in enumerate(options):
        records.append(dict(question=f"Which, {i}?", answer="blue", video="v.mp4", options=given))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    convert(tmp_path, "in.jsonl")
    rows = rows_in(tmp_path)
    assert not nothing.keys() & rows[0].keys()
    tables = [option_table(row.get("options")) for row in rows]
    assert tables == [{}, *[{"A": "red", "B": "blue"}] * 3, {}]
    # a JSONL of ours that has not been converted
    row = dict(prompt_id="a", question="?", answer="A", answer_type="choice", video="v.mp4")
    normal = normalize_row(row | dict(options=options[0]))
    assert normal["options"] == {"A": "red", "B": "blue"}


@pytest.mark.parametrize("answer", ["ABD", "A, B, D", "A, B and D", "(A)(B)(D)", ["A", "B", "D"]])
def test_several_right_options(tmp_path, media, answer):  # noqa: F811
    media(tmp_path / "v.mp4", "film")
    record = dict(question="Which?", answer=answer, options=["w", "x", "y", "z"], video="v.mp4")
    unit = dict(question="Which current?", answer="AC", options=["AC", "DC"], video="v.mp4")
    (tmp_path / "in.json").write_text(json.dumps([record, unit]))
    convert(tmp_path, "in.json")
    row, unit = rows_in(tmp_path)
    assert row["answer_type"] == "multi" and unit["answer_type"] == "choice"
    assert normalize_answer(row["answer"], "multi", row["options"]) == {"A", "B", "D"}


def test_media_as_chat_servers_take_them(tmp_path, media):  # noqa: F811
    """file:// paths, data URIs, and parts named image_url."""
    media(tmp_path / "i.png", "picture")
    media(tmp_path / "v.mp4", "film")
    uri = "data:image/png;base64," + base64.b64encode((tmp_path / "i.png").read_bytes()).decode()
    records = []
    for number, part in enumerate(
        (
            dict(type="video", video=f"file://{tmp_path}/v.mp4"),
            dict(type="image", image=uri),
            dict(type="image_url", image_url=dict(url=uri)),
            dict(type="image_url", image_url=dict(url="i.png")),
        )
    ):
        content = [part, dict(type="text", text=f"What is it, {number}?")]
        records.append(dict(messages=chat_turns(content, "a test")))
    records.append(dict(question="What?", answer="a test", image=uri))
    (tmp_path / "in.json").write_text(json.dumps(records))
    convert(tmp_path, "in.json", "--check-media")
    rows = rows_in(tmp_path)
    (name,) = (tmp_path / "media").iterdir()
    assert name.read_bytes() == (tmp_path / "i.png").read_bytes()
    inside = f"media/{name.name}"
    assert rows[0]["video"] == "v.mp4"
    assert [row["images"] for row in rows[1:]] == [[inside], [inside], ["i.png"], [inside]]


def test_conversations_of_several_questions(tmp_path, media):  # noqa: F811
    """The first makes a row, as later ones may lean on it; or with --all-turns each."""
    media(tmp_path / "v.mp4", "film")
    said = [*TALK, dict(role="assistant", content="no"), *chat_turns("And how many?", "3")]
    greeted = [*chat_turns("Hello!", "Hello, what shall I see?"), *said]
    repeated = [*said[:3], *chat_turns("<video>And how many?", "4")]  # the medium in each turn
    records = [dict(id="a", messages=said), dict(id="b", messages=greeted)]
    records += [dict(id="c", messages=repeated), dict(id="d", messages=said, solution="3")]
    for i, record in enumerate(records):
        record["messages"] = [*record["messages"]]
        record["videos"] = ["v.mp4"]
        question = next(t for t in record["messages"] if "red" in t["content"])
        place = record["messages"].index(question)
        record["messages"][place] = dict(role="user", content=f"<video>Is it red, {i}?")
    (tmp_path / "in.json").write_text(json.dumps(records))
    convert(tmp_path, "in.json")
    rows = [(row["prompt_id"], row["question"], row["answer"]) for row in rows_in(tmp_path)]
    assert rows == [(q, f"Is it red, {i}?", "no") for i, q in enumerate("abc")]
    report = report_of(tmp_path)
    assert report["changed"]["later questions of a conversation are left out"]["count"] == 3
    assert report["dropped"]["several turns"]["count"] == 1
    convert(tmp_path, "in.json", "--all-turns", "--force")
    rows = [(row["prompt_id"], row["answer"]) for row in rows_in(tmp_path)]
    # b's second question is a's, about the same clip
    assert rows == [("a-0", "no"), ("a-1", "3"), ("b-1", "no"), ("c-0", "no"), ("c-1", "4")]


def test_text_around_a_question(tmp_path, media):  # noqa: F811
    """Closing sentences leave the options, placeholders get names, and the report counts both."""
    media(tmp_path / "p1.png", "picture")
    media(tmp_path / "p2.png", "picture")
    pictures = ["p1.png", "p2.png"]
    questions = [
        "<image><image>Which?\nA. red\nB. blue\nAnswer with the option's letter.",
        "Is <image> darker than <image>?",
        "<image>Which is red?",  # one placeholder, two pictures
        "<image><image>What does the <image> tag do?",
    ]
    answers = ["A", "no", "first", "nothing"]
    records = []
    for question, answer in zip(questions, answers):
        turn = dict(role="user", content=question)
        records.append(dict(messages=[turn], images=pictures, answer=answer))
    (tmp_path / "in.json").write_text(json.dumps(records))
    convert(tmp_path, "in.json")
    first, second, last = rows_in(tmp_path)
    assert (first["question"], first["options"]) == ("Which?", ["A. red", "B. blue"])
    assert second["question"] == "Is picture 1 darker than picture 2?"
    assert last["question"] == "What does the <image> tag do?"
    report = report_of(tmp_path)
    assert report["dropped"]["placeholders are not as many as the media"]["count"] == 1
    assert [part["count"] for part in report["changed"].values()] == [1, 1]


def test_sentences_are_free_form_and_one_sided_answers_are_reported(tmp_path, media):  # noqa: F811
    media(tmp_path / "v.mp4", "film")
    sentence = "It is the sound of breaking glass."
    records = [dict(question="What is it?", answer=sentence, video="v.mp4")]
    records += [
        dict(question=f"When is {i}?", answer=0 if i < 8 else i, video="v.mp4") for i in range(10)
    ]
    (tmp_path / "in.json").write_text(json.dumps(records))
    printed = convert(tmp_path, "in.json")
    assert rows_in(tmp_path)[0]["answer_type"] == "free-form"
    assert "8 of 10 number answers" in printed and "--max-answer-share" in printed
    printed = convert(
        tmp_path, "in.json", "--max-answer-share", 0.5, "--open-type", "text", "--force"
    )
    answers = [row["answer"] for row in rows_in(tmp_path)]
    assert sorted(answers) == sorted([sentence, "0", "0", "8", "9"])
    report = report_of(tmp_path)
    assert report["dropped"]["over --max-answer-share"]["count"] == 6
    assert "--open-type free-form" in " ".join(report["warnings"])


def test_the_output_and_its_old_held_out_file(tmp_path, media):  # noqa: F811
    many_rows(tmp_path, media)
    convert(tmp_path, "in.json", "--held-out", 4)
    assert (tmp_path / "rows.held-out.jsonl").exists()
    convert(tmp_path, "in.json", "--force")  # its rows are in rows.jsonl now
    assert not (tmp_path / "rows.held-out.jsonl").exists() and len(rows_in(tmp_path)) == 40
    (tmp_path / "folder").mkdir()
    for flags in ([], ["--force"]):
        files = [tmp_path / "in.json", "--out", tmp_path / "folder"]
        line = launch("prepare.py", "rows", *files, *flags, code=1)
        assert "--out" in line and "folder" in line and "Traceback" not in line
    assert not list(tmp_path.glob("folder.*"))
    line = launch("train_rl.py", "--data", tmp_path / "in.json", "--out", tmp_path / "r", code=1)
    assert "prepare.py rows" in line


def test_music_avqa_with_the_sound_of_another_clip_is_left_out(tmp_path, media):  # noqa: F811
    records = [dict(video_id="1", question_content="Is it?", templ_values=[], anser="no")] * 2
    records[1] = records[1] | dict(unmatch_audio="2")
    media(tmp_path / "1.mp4", "film")
    (tmp_path / "in.json").write_text(json.dumps(records))
    convert(tmp_path, "in.json")
    assert len(rows_in(tmp_path)) == 1
    assert report_of(tmp_path)["dropped"]["its sound is another clip's"]["count"] == 1


def many_rows(folder, media, count=40):  # noqa: F811
    """Four questions about each clip."""
    for i in range(count // 4):
        media(folder / "Set" / f"{i}.mp4", "film")
    records = [
        R1 | dict(problem_id=i, problem=f"Question {i}?", path=f"Set/{i // 4}.mp4")
        for i in range(count)
    ]
    (folder / "in.json").write_text(json.dumps(records))


def test_held_out_must_leave_rows_to_train_on(tmp_path, media):  # noqa: F811
    records = []
    for i in range(3):
        media(tmp_path / f"{i}.png", "picture")
        records.append(dict(question="What?", answer="red", images=[f"{i}.png"]))
    (tmp_path / "in.json").write_text(json.dumps(records))
    printed = convert(tmp_path, "in.json", "--held-out", 4, code=1)
    assert "--held-out 4" in printed
    assert not (tmp_path / "rows.jsonl").exists()


def test_held_out_by_clip_limit_and_the_same_bytes(tmp_path, media):  # noqa: F811
    many_rows(tmp_path, media)
    flags = ("--held-out", 6, "--limit", 30, "--force")
    convert(tmp_path, "in.json", *flags)
    first = [
        (tmp_path / name).read_bytes()
        for name in ("rows.jsonl", "rows.held-out.jsonl", "rows.report.json")
    ]
    train_rows, held = rows_in(tmp_path), rows_in(tmp_path, "rows.held-out.jsonl")
    assert len(train_rows) + len(held) == 30 and 6 <= len(held) < 10
    assert not {row["video"] for row in train_rows} & {row["video"] for row in held}
    convert(tmp_path, "in.json", *flags)
    names = ("rows.jsonl", "rows.held-out.jsonl", "rows.report.json")
    assert first == [(tmp_path / name).read_bytes() for name in names]
    convert(tmp_path, "in.json", *flags, "--seed", 1)
    assert (
        rows_in(tmp_path) != train_rows
        and report_of(tmp_path)["dropped"]["over --limit"]["count"] == 10
    )


def test_a_clip_is_held_out_with_its_sound_and_without(tmp_path, media):  # noqa: F811
    records = []
    for i in range(8):
        media(tmp_path / f"{i}.mp4", "film")
        for use_audio in (True, False, "auto"):
            question = f"Is it {use_audio}?"
            row = dict(prompt_id=f"{i}-{use_audio}", question=question, answer="yes")
            row |= dict(answer_type="yesno", video=f"{i}.mp4", use_audio=use_audio)
            records += [row, row | dict(prompt_id=f"{i}-{use_audio}-start", end=0.5)]
    (tmp_path / "in.json").write_text(json.dumps(records))
    convert(tmp_path, "in.json", "--held-out", 12)
    assert report_of(tmp_path)["dropped"] == {}  # another span is another clip
    held = {row["video"] for row in rows_in(tmp_path, "rows.held-out.jsonl")}
    assert len(held) == 2 and not held & {row["video"] for row in rows_in(tmp_path)}


def test_what_a_benchmark_holds_is_dropped(tmp_path, media):  # noqa: F811
    many_rows(tmp_path, media)
    item = dict(Question="question 9?", Choice=["A. x", "B. y"], Answer="A", video_id="3")
    (tmp_path / "root" / "daily-omni").mkdir(parents=True)
    (tmp_path / "root" / "daily-omni" / "qa.json").write_text(json.dumps([item]))
    convert(tmp_path, "in.json", "--exclude-benchmarks", tmp_path / "root")
    kept = {row["question"] for row in rows_in(tmp_path)}
    assert report_of(tmp_path)["dropped"]["in daily-omni"]["count"] == 1
    assert len(kept) == 39 and "Question 9?" not in kept  # clips are called 3_video there
    line = convert(tmp_path, "in.json", "--exclude-benchmarks", tmp_path / "Set", "--force", code=1)
    assert "--exclude-benchmarks" in line


def test_clips_that_cannot_be_decoded_and_a_page(tmp_path, media):  # noqa: F811
    many_rows(tmp_path, media)
    clip = tmp_path / "Set" / "2.mp4"
    clip.write_bytes(clip.read_bytes()[:1500])
    convert(tmp_path, "in.json", "--check-media", "--html", 3, "--max-bad-frac", 0.2)
    report = report_of(tmp_path)
    assert report["dropped"]["media broken"]["count"] == 4 and report["kept"] == 36
    page = (tmp_path / "rows.html").read_text()
    assert (
        page.count("<article") == 3 and page.count("data:image/jpeg") >= 6 and "Question 0?" in page
    )


def test_wrong_options_and_wording_follow_the_seed():
    context, other = (converters.Context(".", seed=seed) for seed in (0, 1))
    record = dict(Category="Bark", VideoID="v", Quality="good", StartTime="2", EndTime="5")
    rows = [next(converters.ave(record | dict(VideoID=str(i)), context)) for i in range(200)]
    assert rows == [
        next(converters.ave(record | dict(VideoID=str(i)), context)) for i in range(200)
    ]
    assert rows != [next(converters.ave(record | dict(VideoID=str(i)), other)) for i in range(200)]
    choices = [row for row in rows if row["answer_type"] == "choice"]
    places = np.bincount([row["options"].index("Bark") for row in choices], minlength=4)
    assert len(choices) > 60 and (places > 5).all()  # the right one stands anywhere
    assert all(
        len(set(row["options"])) == 4 and set(row["options"]) <= set(converters.AVE_EVENTS)
        for row in choices
    )
