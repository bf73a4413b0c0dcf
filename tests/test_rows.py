"""
Rows: their format, what is wrong with them, the file.

    python -m pytest tests/test_rows.py
"""

import json
import re
import tracemalloc

import pytest
from media_files import make_row

import rewards
from answers import option_table
from data.clips import BadRow
from data.rows import Rows, completion_text, normalize_row, question_text
from hints import place_hint

# ---- rows --------------------------------------------------------------------------------------

OPTIONS = ["red", "green", "blue"]
BAD_ROWS = [
    (dict(question=""), "empty question"),
    (dict(question=["a"]), "question is .*: give it as text"),
    (dict(hint=3), "hint is 3: give it as text"),
    (dict(answer=""), "empty answer: give one"),
    (dict(answer=None), "empty answer"),
    (dict(answer=[], answer_type="multi"), "empty answer"),
    (dict(answer_type="essay"), "answer_type essay: one of choice, multi"),
    (dict(answer_type=["choice"]), "answer_type .*one of"),
    (dict(answer_type=None), "answer_type None"),
    (dict(answer="many"), "'many' .*number.*: mend answer"),
    (
        dict(answer="D", answer_type="choice", options=OPTIONS),
        "'D' .*choice answer.*mend",
    ),
    (dict(answer=3, answer_type="choice", options=OPTIONS), "3 .*choice"),
    (dict(answer=["A", "F"], answer_type="multi", options=OPTIONS), "mend answer"),
    (dict(answer=["A"], answer_type="choice", options=OPTIONS), "a list .*choice answer"),
    (dict(answer={"a": 1}, answer_type="text"), "a dict .*text answer"),
    (dict(answer="a cat", answer_type="location"), "location answer"),
    (dict(answer="maybe", answer_type="yesno"), "yesno answer"),
    (dict(options="A. red B. blue"), "options 'A. red B. blue': give a list"),
    (dict(options=[None, 1]), "options .*give a list"),
    (dict(options=["a", " "]), "options .*give a list"),
    (dict(options={"X": "a"}), "options .*A..J"),
    (dict(options={"a": "x", "A": "y"}), "options .*give a list"),
    (dict(options=list("abcdefghijk")), "of 1 to 10 texts"),
    (dict(options=5), "options 5: give a list"),
    (dict(options="{'red', 'blue'}"), "options .*give a list"),
    (
        dict(question="What does <|AUDIO|> say?"),
        "question holds the reserved <|AUDIO|>: remove it".replace("|", r"\|"),
    ),
    (dict(hint="see <|VIDEO|>"), "hint holds the reserved"),
    (dict(audio_caption="<|im_end|>"), "audio_caption holds the reserved"),
    (dict(reasoning="<|IMAGE|>"), "reasoning holds the reserved"),
    (dict(options=["a", "<|im_start|>"]), "option B holds the reserved"),
    (dict(answer="<|x1|>", answer_type="text"), "answer holds the reserved"),
    (dict(reasoning="so </think> 3"), "reasoning holds the reserved </think>: remove"),
    (dict(video=None), "no media: give video, audio or images"),
    (dict(video=["a.mp4"]), "media .*: give paths as text"),
    (dict(images=[{"path": "x"}]), "media .*: give paths as text"),
    (dict(video="a\0b.mp4"), "give paths as text"),
    (dict(use_audio="false"), "use_audio 'false': give true, false or"),
    (dict(use_audio=True, audio="x.wav"), "use_audio is for sound in `video`"),
    (dict(use_audio=True, video=None, images=["x.png"]), "use_audio is for sound in `video`"),
    (dict(start=3, end=3), "start 3, end 3: give seconds, start before end"),
    (dict(start=3, end=2), "start before end"),
    (dict(start=-1), "start -1"),
    (dict(end=0), "end 0"),
    (dict(start="1:20"), "give seconds"),
    (dict(start=float("nan")), "start nan"),
    (dict(start=1e300), "give seconds"),
    (dict(useaudio=True), "unknown key 'useaudio': did you mean use_audio"),
    (dict(strat=1.0, end=2.0), "unknown key 'strat': did you mean start"),
    (dict(image="x.png"), "unknown key 'image': did you mean images"),
    (dict(Audio="x.wav"), "unknown key 'Audio': did you mean audio"),
    (dict(question="cut emoji \ud83d?"), r"a text has half a character, '\\ud83d': mend it"),
    (dict(video="\udc80.mp4"), "has half a character"),
]


@pytest.mark.parametrize("fields, words", BAD_ROWS)
def test_bad_rows_are_one_clear_line(fields, words):
    with pytest.raises(BadRow) as error:
        normalize_row(make_row(**{"video": "x.mp4", **fields}))
    line = str(error.value)
    assert re.match("'?row r7'?: ", line) and re.search(words, line) and "\n" not in line


def test_other_keys_are_nobodys_business():
    other = dict(question_id=7, video_id="x", answers=["a"], duration=3.0, category="color")
    row = normalize_row(make_row(video="x.mp4", **other))
    assert row == normalize_row(make_row(video="x.mp4")) | other


GOOD_ROWS = [  # answer_type, answer, options, the answer as text
    ("choice", "B", OPTIONS, "B"),
    ("choice", "green", OPTIONS, "green"),  # as the row writes it: what stage 0 teaches
    ("choice", " b. green\n", OPTIONS, "b. green"),
    ("choice", 1, OPTIONS, "B"),
    ("choice", 0, ["A. x", "B. y"], "A"),
    ("choice", "C", None, "C"),  # the options stand in the question
    ("choice", "E", {"D": "red", "E": "blue"}, "E"),
    ("choice", "b", "['red', 'green']", "b"),  # IntentBench
    ("choice", 2, [1, 2, 3.5], "C"),
    ("choice", 0, ["B", "A"], "B"),  # options that are letters: their text wins, as in rewards.py
    ("multi", ["A", "blue"], OPTIONS, "A, C"),
    ("multi", [0, 2], OPTIONS, "A, C"),
    ("multi", "CA", OPTIONS, "CA"),
    ("number", 3, None, "3"),
    ("number", 2.5, None, "2.5"),
    ("number", " 1,000 m ", [], "1,000 m"),
    ("yesno", "Yes", None, "Yes"),
    ("yesno", True, None, "True"),
    ("text", "A cat", None, "A cat"),
    ("location", "left: cat | right: dog", None, "left: cat | right: dog"),
]


@pytest.mark.parametrize("kind, answer, options, text", GOOD_ROWS)
def test_answers_become_text_that_scores_one(kind, answer, options, text):
    row = normalize_row(make_row(video="x.mp4", answer=answer, answer_type=kind, options=options))
    assert row["answer"] == text
    assert rewards.accuracy_reward(text, row["answer"], kind, row["options"]) == 1
    taught = completion_text(dict(row, reasoning="because"))
    assert rewards.parse_answer(taught) == text and taught.startswith("<think>because</think>")
    if not isinstance(options, str):
        assert rewards.accuracy_reward(text, answer, kind, row["options"]) == 1


@pytest.mark.parametrize(
    "options, line",
    [
        (["red", "blue"], "A. red B. blue"),
        (["A. red", "B. blue"], "A. red B. blue"),
        (["(A) red", "(B) blue"], "A. red B. blue"),
        # not every option has its own letter before it: none is a prefix
        (["A. red", "blue"], "A. A. red B. blue"),
        (["B. red", "A. blue"], "A. B. red B. A. blue"),
        ({"a": "red", "C": "blue"}, "A. red C. blue"),
        ({"A": "A: red", "C": "C: blue"}, "A. red C. blue"),
        ([1, 2], "A. 1 B. 2"),
    ],
)
def test_the_question_shows_options_as_the_scorer_reads_them(options, line):
    choice = dict(question="Which?", answer="A", answer_type="choice", options=options)
    row = normalize_row(make_row(video="x.mp4", **choice))
    assert question_text(row, True) == f"Which?\n{line}\nAnswer with one option."
    for letter, text in option_table(row["options"]).items():
        assert f"{letter}. {text}" in line
        assert rewards.accuracy_reward(text, letter, "choice", row["options"]) == 1


def test_hint_and_caption_stand_before_the_question():
    row = normalize_row(make_row(video="x.mp4", audio_caption="a bell"))
    plain = "How many?\nAnswer with a number."
    assert question_text(row, False) == plain
    assert place_hint(question_text(row, True), "look up") == (
        f"Hint: look up.\nSound: a bell.\n{plain}"
    )


# Rows of Video-R1-260k and -COT-165k, AVQA-R1-6K and IntentTrain as they are published.
VIDEO_R1 = dict(
    problem_id=2,
    problem="What appears on the screen in Russian during the missile's ascent?",
    data_type="video",
    problem_type="multiple choice",
    options=["A. A YouTube subscribe button", "B. A Facebook like button"],
    process="<think>\nA button appears.\n</think>",
    solution="<answer>A</answer>",
    path="./LLaVA-Video-178K/academic/1.mp4",
    data_source="LLaVA-Video-178K",
)
AVQA_PATH = {"image": "i.jpg", "audio": "a.wav"}
INTENT_PATH = {"video": "v.mp4", "audio": "a.wav"}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, dict(video="./LLaVA-Video-178K/academic/1.mp4", images=[])),
        ({}, dict(answer="A", answer_type="choice", reasoning="A button appears.")),
        (dict(data_type="image", path="./a/1.png", process=None), dict(images=["./a/1.png"])),
        (dict(data_type="image_audio", path=AVQA_PATH), dict(images=["i.jpg"], audio="a.wav")),
        (dict(path=INTENT_PATH), dict(video="v.mp4", audio="a.wav")),
    ],
)
def test_video_r1_rows_load_as_they_are(fields, expected):
    row = normalize_row({**VIDEO_R1, **fields})
    assert row["prompt_id"] == "2" and row["question"] == VIDEO_R1["problem"]
    assert {key: row[key] for key in expected} == expected
    asked = question_text(row, False)
    assert "\nA. A YouTube subscribe button B. A Facebook like button\n" in asked


@pytest.mark.parametrize(
    "problem_type, solution, answer_type",
    [
        ("numerical", "42", "number"),
        ("regression", "3.50", "number"),
        ("free-form", "a red car", "free-form"),
        ("OCR", "EXIT 12", "ocr"),
        ("judge", "Yes", "yesno"),
        ("emer_ov_mc", "A,B", "multi"),
    ],
)
def test_problem_types_of_video_r1(problem_type, solution, answer_type):
    fields = dict(problem_type=problem_type, options=[], solution=f"<answer>{solution}</answer>")
    row = normalize_row({**VIDEO_R1, **fields})
    assert (row["answer"], row["answer_type"], row["options"]) == (solution, answer_type, None)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(problem_type="essay"), "problem_type essay: one of multiple choice"),
        (dict(problem_type=None), "problem_type None"),
        (dict(data_type="text"), "data_type text: one of video, audio, image"),
        (dict(path=None), "no media"),
        (dict(solution="<answer></answer>"), "empty answer"),
        (dict(solution="<answer>Q</answer>"), "mend answer"),
    ],
)
def test_bad_video_r1_rows(fields, words):
    with pytest.raises(BadRow, match=f"row 2: .*{words}"):
        normalize_row({**VIDEO_R1, **fields})


# ---- the file ----------------------------------------------------------------------------------


def test_a_large_file_stays_on_the_disk(tmp_path):
    """Offsets and hashes: under 100 bytes a row, whatever the rows hold."""
    count, text = 20_000, "why " * 100
    with open(tmp_path / "rows.jsonl", "w") as file:
        for i in range(count):
            row = make_row(prompt_id=f"q{i}", question=text, video="x.mp4")
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    rows = Rows(tmp_path / "rows.jsonl")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count and rows[rows.index("q777")]["prompt_id"] == "q777"
    assert held < 100 * count and peak < 200 * count < (tmp_path / "rows.jsonl").stat().st_size


def test_rows_are_found_by_number_and_by_id(tmp_path):
    rows = [
        make_row(
            prompt_id=f"é{i}" if i % 2 else i, video=f"{i}.mp4", question="Wie viel?" * i + "ü"
        )
        for i in range(200)
    ]
    lines = [json.dumps(row, ensure_ascii=bool(i % 3)) for i, row in enumerate(rows)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        "\r\n\n".join(["\ufeff" + lines[0], *lines[1:]]).encode()
    )  # BOM, CRLF, blank lines, no end
    table = Rows(path)
    assert len(table) == 200 and len(list(table)) == 200
    for i in (0, 1, 150, 199, -1):
        assert table[i]["video"] == rows[i]["video"] and table[i]["question"] == rows[i]["question"]
        assert table.index(str(rows[i]["prompt_id"])) == i % 200
    with pytest.raises(BadRow, match="has no row 'é2'"):
        table.index("é2")
    arrays = (table.offsets, table.id_hashes, table.content_hashes, table.by_hash)
    held = sum(array.nbytes for array in arrays)
    assert held == 32 * len(table)  # 32 MB for 10^6 rows, whatever their length


@pytest.mark.parametrize(
    "lines, words",
    [
        ([make_row(), "{'a': 1}"], "x.jsonl:2: not JSON .*: write one object a line"),
        ([make_row(), "", '{"prompt_id": '], "x.jsonl:3: not JSON"),
        (["[" * 100000], "x.jsonl:1: not JSON"),
        (["\udcff"], "x.jsonl:1: not JSON"),
        ([[make_row()]], "x.jsonl:1: a list, not an object: write one object a line"),
        ([make_row(), dict(question="?")], "x.jsonl:2: prompt_id is None: give every row a unique"),
        ([make_row(prompt_id="")], "x.jsonl:1: prompt_id is ''"),
        ([make_row(prompt_id="two\nlines")], "x.jsonl:1: prompt_id is 'two"),
        (
            [make_row(prompt_id=5), make_row(), make_row(prompt_id="5")],
            "prompt_id '5' occurs twice: make ids unique",
        ),
        ([], "has no rows: give a JSONL"),
        (None, "x.jsonl.*: give a JSONL file"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, lines, words):
    path = tmp_path / "x.jsonl"
    if lines is not None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_bytes("".join(text + "\n" for text in texts).encode(errors="surrogateescape"))
    with pytest.raises(BadRow, match=words):
        Rows(path)


def test_a_folder_and_utf16_are_named_as_such(tmp_path):
    with pytest.raises(BadRow, match="is a folder"):
        Rows(tmp_path)
    path = tmp_path / "x.jsonl"
    rows = "\n".join(json.dumps(make_row(prompt_id=name)) for name in "ab")
    path.write_text(rows, encoding="utf-16")
    with pytest.raises(BadRow, match="x.jsonl:1: not JSON in UTF-8"):
        Rows(path)
