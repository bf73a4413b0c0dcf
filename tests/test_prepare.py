"""
`prepare.py check`.

    python -m pytest tests/test_prepare.py
"""

import re

from conftest import RECIPE, launch
from media_files import make_row, write_jsonl

from data import row_check


def test_check_names_every_bad_row_and_counts(media):
    rows = [
        make_row(prompt_id="a", video="good.mp4", use_audio=True),
        make_row(prompt_id="b", video="nowhere.mp4"),
        "not json",
        make_row(prompt_id="a", video="good.mp4"),
        make_row(prompt_id="c", video="silent.mp4", use_audio=True),
        make_row(prompt_id="d", audio="good.wav", answer="?"),
        dict(question="?"),
        make_row(prompt_id="e", video="../outside.mp4"),
        make_row(prompt_id="f", images=["good.png"]),
    ]
    path = write_jsonl(media / "rows.jsonl", rows[:4] + [""] + rows[4:])
    lines = launch("prepare.py", "check", path, code=1).splitlines()
    begins = [
        "2: row b: no file at",
        "3: not JSON",
        "4: row a: the id occurs twice: make ids unique",
        "6: row c: silent.mp4 has no audio stream",
        "7: row d: '?'",
        "8: prompt_id is None",
        "9: row e: ../outside.mp4 is not in",
    ]
    for line, begin in zip(lines, begins):
        assert line.replace(f"{media}/", "").startswith(f"rows.jsonl:{begin}")
    assert lines[7:] == ["9 rows, 7 would not train"]
    checks = row_check.check_rows(path, RECIPE, None, 1)
    assert [check.problem for check in checks if check.problem] == lines[:7]
    fine = write_jsonl(media / "fine.jsonl", [rows[0], rows[7]])
    printed = launch("prepare.py", "check", fine, "--allow-outside")
    assert printed == "2 rows, 0 would not train\n"


def test_check_counts_tokens_with_a_model(media, toy_dir):
    rows = [
        make_row(prompt_id="a", video="good.mp4"),
        make_row(prompt_id="b", images=["good.png"], question="why " * 300),
        make_row(prompt_id="c", images=["good.png"], hint="why " * 300),
    ]
    path = write_jsonl(media / "long.jsonl", rows)
    check = ["prepare.py", "check", path, "--model", toy_dir / "model"]
    assert launch(*check).endswith("3 rows, 0 would not train\n")
    *lines, last = launch(*check, "--max-prompt-tokens", 400, code=1).splitlines()
    assert last == "3 rows, 2 would not train" and len(lines) == 2
    for line, name in zip(lines, "bc"):
        assert f"row {name}: " in line
        assert "over --max-prompt-tokens 400: lower --max-frames" in line


def test_check_ends_in_one_line(media, tmp_path):
    path = write_jsonl(media / "one.jsonl", [make_row(video="good.mp4")])
    for flags, words in (
        ([path, "--max-frames", 1], "prepare.py: --max-frames 1: .* 2"),
        ([path, "--model", tmp_path / "none"], "prepare.py: no model at .*none: .*"),
        ([tmp_path / "none.jsonl"], "prepare.py: .*none.jsonl.*"),
        ([write_jsonl(media / "no.jsonl", [])], "0 rows, 0 would not train"),
    ):
        assert re.fullmatch(words, launch("prepare.py", "check", *flags, code=1).strip())
