"""
What README and docs promise is tried: their commands run, their examples work, their tables are the code's.

    python -m pytest tests/test_docs.py

A block of commands is run here, with few steps, unless its section says "not run", or a comment
above it names the test that runs it: <!-- tested: tests/test_x.py -->. That file must then use the
block's scripts and flags.
"""

import functools
import importlib
import itertools
import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, launch

import rewards
import toy
from data import converters
from experiments import expected
from models import inputs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# appended to a command of the docs, so that it takes a second: the last of two equal flags counts
TEST_SUITE = "-m pytest"  # the README's second command is what CI runs
SHORT = {
    "train_sft.py": "--steps 1 --save-every 0 --batch-size 2",
    "train_rl.py": "--steps 1 --save-every 1 --eval-every 0 --prompts-per-step 2 --max-new-tokens 12",
    "eval.py": "--max-new-tokens 4",
    "ask.py": "--max-new-tokens 4",
}


def blocks_of(page):
    """-> (commands, section up to the end of the block) of each bash block of a page."""
    text = page.read_text()
    for match in re.finditer(r"^```bash\n(.*?)^```", text, re.M | re.S):
        heading = text.rfind("\n#", 0, match.start())
        section = text[max(heading, 0) : match.end()]
        yield match[1], section


def commands_of(block):
    """-> argument lists of a block's commands, without comments and prompts."""
    for line in re.split(r"&&|\n", block.replace("\\\n", " ")):
        if words := shlex.split(line, comments=True):
            yield words


def named_test(section):
    """The test file that the comment above the section's last block names, or None."""
    named = re.search(r"<!-- tested: (\S+) -->\n+```bash\n[^`]*```$", section)
    return named and named[1]


def is_run_here(section):
    """False where the docs say that it was not run, or name the test that runs it."""
    return not (re.search(r"not\s+run", section, re.I) or named_test(section))


RUN_HERE = {
    page.name: [block for block, section in blocks_of(page) if is_run_here(section)]
    for page in PAGES
}
RUN_ELSEWHERE = [
    (page.name, named_test(section), block)
    for page in PAGES
    for block, section in blocks_of(page)
    if named_test(section)
]


@pytest.fixture(scope="module")
def finished_run(toy_dir, tmp_path_factory):
    """A folder of a run of one step."""
    out = tmp_path_factory.mktemp("runs") / "stage2"
    flags = ("--data", toy_dir / "stage2" / "train.jsonl", "--model", toy_dir / "model")
    launch("train_rl.py", *flags, "--out", out, *SHORT["train_rl.py"].split())
    return out


@pytest.fixture
def workplace(toy_dir, finished_run, tmp_path, monkeypatch):
    """A folder with a small toy, rows.jsonl with its clips, and a finished run in it."""
    monkeypatch.chdir(tmp_path)
    # a link for the paths of commands; relative media of its rows stay inside it
    (tmp_path / "toy").symlink_to(toy_dir)
    write_defaults = functools.partial(toy.write_defaults, root=toy_dir)
    monkeypatch.setattr(toy, "write_defaults", write_defaults)
    monkeypatch.setattr(toy, "default_model", functools.partial(toy.default_model, root=toy_dir))
    shutil.copy(toy_dir / "stage2" / "test.jsonl", tmp_path / "rows.jsonl")
    (tmp_path / "clips").symlink_to(toy_dir / "stage2" / "clips")
    return tmp_path


def write_files_of_the_tutorial(folder):
    """What the tutorial's reader brings: its clips, drawn as it shows, and its questions."""
    (folder / "clips").unlink()
    (folder / "rows.jsonl").unlink()
    text = (ROOT / "docs" / "tutorial.md").read_text()
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
    (folder / "mine.jsonl").write_text(re.search(r"```json\n(.*?)```", text, re.S)[1])


@pytest.mark.parametrize("page", [name for name, blocks in RUN_HERE.items() if blocks])
def test_commands_run(page, workplace, finished_run):
    """All blocks of a page, in order, in one folder."""
    if page == "tutorial.md":
        write_files_of_the_tutorial(workplace)
    if page != "README.md":  # its first command makes this run
        (workplace / "runs").mkdir()
        (workplace / "runs" / "stage2").symlink_to(finished_run)
    for words in itertools.chain(*map(commands_of, RUN_HERE[page])):
        if TEST_SUITE in shlex.join(words):
            continue
        script = next((word for word in words if word.endswith(".py") and "/" not in word), None)
        if script is None:
            assert words[0] == "source" or "pip" in words[0] or "venv" in words, words
            continue
        flags = words[words.index(script) + 1 :]
        short = SHORT.get(script, "")
        if script.startswith("train_") and "--resume" in flags:
            short = "--steps 2"
        launch(script, *flags, *short.split())


def source_with_imports(test):
    """The text of a test file and of the test files that it imports from."""
    text = (ROOT / test).read_text()
    for module in re.findall(r"^from (\w+) import", text, re.M):
        path = ROOT / "tests" / f"{module}.py"
        text += path.read_text() if path.exists() else ""
    return text


@pytest.mark.parametrize("page, test, block", RUN_ELSEWHERE)
def test_the_named_test_uses_the_scripts_and_flags(page, test, block):
    """So a flag that is renamed in the code, and with it in the test, fails here until the page has it."""
    source = source_with_imports(test)
    for words in commands_of(block):
        if words[0] != "python":  # pip, tensorboard
            continue
        script = words[2] if words[1] == "-m" else words[1]
        name = script.removesuffix(".py").split(".")[-1]
        assert re.search(rf"\b{name}\b", source), (page, test, script)
        for flag in (word for word in words if word.startswith("--")):
            keyword = flag.strip("-").replace("-", "_")
            assert re.search(rf"{flag}\b|\b{keyword}=", source), (page, test, flag)


# ---- README


def test_the_readmes_second_command_is_what_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for word in ("requirements-test.txt", ".venv/bin/python -m pytest -q"):
        assert word in readme and word in ci
    assert "ruff check" in ci and "ruff format --check" in ci
    assert "-r requirements.txt" in (ROOT / "requirements-test.txt").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert any(step.get("run") == "bash .ci/run" for step in workflow["jobs"]["tests"]["steps"])


def test_requirements_are_pinned():
    for name in ("requirements.txt", "requirements-test.txt"):
        for line in (ROOT / name).read_text().splitlines():
            line = line.partition("#")[0].strip()
            assert not line or line.startswith("-r") or re.fullmatch(r"[\w-]+==[\w.]+", line), line


def test_citation_file_names_paper_and_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] and "AVATAR" in citation["preferred-citation"]["title"]
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text()


# ---- extend.md: its examples, as printed


def examples(section):
    """-> Python blocks of a section of extend.md."""
    text = (ROOT / "docs" / "extend.md").read_text()
    text = re.search(rf"^## {section}\n(.*?)(?=^## )", text, re.M | re.S)[1]
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_copied_files(tmp_path, monkeypatch):
    for name in ("grpo.py", "tas.py"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    (example,) = examples("Copy a file")
    old_logprobs = -torch.rand(4, 10)
    names = dict(
        torch=torch,
        G=4,
        num_completions=4,
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        completion_mask=torch.ones(4, 10, dtype=torch.bool),
        logprobs=old_logprobs.clone().requires_grad_(),
        old_logprobs=old_logprobs,
        ref_logprobs=old_logprobs,
    )
    exec(example, names)
    names["loss"].backward()
    assert names["logprobs"].grad.abs().sum() > 0


def test_own_reward_part(toy_dir, tmp_path, monkeypatch):
    (example,) = examples("A reward part")
    names, function, line = re.split(r"^# \d\..*\n", example, flags=re.M)[1:]
    source = (ROOT / "rewards.py").read_text()
    source = re.sub(r"^PARTS = .*\n", lambda _: names, source, flags=re.M)
    source = source.replace("def reward_completions", f"{function}\ndef reward_completions")
    judge = '        if "judge" in weights:\n'
    assert source.count(judge) == 1
    exec(source.replace(judge, line + judge), changed := {"__name__": "rewards"})
    assert changed["brief_reward"]("x" * 300) == 0.5

    for name in ("PARTS", "reward_completions"):
        monkeypatch.setattr(rewards, name, changed[name])
    weights = "format=.2,acc=.4,self=.2,brief=.2"
    flags = f"--stage 2 --reward-weights {weights} {SHORT['train_rl.py']}".split()
    flags += ["--model", toy_dir / "model", "--data", toy_dir / "stage2" / "train.jsonl"]
    launch("train_rl.py", *flags, "--out", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < metrics["rewards/brief"] <= 1


def test_own_data_format(workplace, monkeypatch):
    (example,) = examples("A data format")
    monkeypatch.setattr(converters, "FORMATS", dict(converters.FORMATS))
    exec(example, vars(converters) | {"FORMATS": converters.FORMATS})
    record = {"clip": "clips/test-00000.mp4", "ask": "Which?", "right": "a", "distractors": ["b"]}
    (workplace / "quiz.json").write_text(json.dumps([record]))
    launch("prepare.py", "rows", "quiz.json", "--stage", 2, "--out", "made.jsonl")
    (row,) = map(json.loads, (workplace / "made.jsonl").read_text().splitlines())
    assert (row["answer"], sorted(row["options"])) == ("a", ["a", "b"])


def test_own_backbone(toy_dir, tmp_path, monkeypatch):
    (example,) = examples("A backbone")
    monkeypatch.setattr(inputs, "BACKBONES", dict(inputs.BACKBONES))
    exec(example, {})
    assert inputs.BACKBONES["my_omni"].SIDE == 56
    interface = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "extend.md").read_text(), re.M)
    for name in re.findall(r"`(\w+)`", " ".join(interface)):
        assert hasattr(inputs.BACKBONES["my_omni"], name), name
        assert re.search(rf"\b{name}\b", inputs.__doc__), name


# ---- tables


def rows_of(text, columns):
    """-> cells of each row of a text's tables that have so many columns, headings left out."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == columns and not cells[0].startswith("---"):
            yield cells


def as_written(value):
    """A flag's value in the words of the table."""
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


def same_value(cell, value):
    value = as_written(value)
    return float(cell) == value if isinstance(value, (int, float)) else cell == value


@pytest.mark.parametrize("script", ["train_rl", "train_sft"])
def test_hyper_parameters_are_the_parsers_defaults(script):
    parse_args = importlib.import_module(script).parse_args
    full = parse_args(["--model", "some/7B", "--out", "x"])[0]
    small = parse_args(["--out", "x"])[0]
    page = (ROOT / "docs" / "hyper-parameters.md").read_text()
    section = re.search(rf"^## [^\n]*{script}\.py\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]
    checked = set()
    for flag, _, _, ours, toys, _ in rows_of(section, 6):
        if flag.startswith("`--"):
            name = flag.strip("`-").replace("-", "_")
            assert same_value(ours, getattr(full, name)), (flag, ours, getattr(full, name))
            assert same_value(toys, getattr(small, name)), (flag, toys, getattr(small, name))
            checked.add(name)
    overridden = set(toy.OVERRIDES["rl" if script == "train_rl" else "sft"]) - {"eval_every"}
    assert checked >= overridden | {"lr", "lora_rank"}


def test_hyper_parameters_that_are_constants():
    page = (ROOT / "docs" / "hyper-parameters.md").read_text()
    for name, _, _, ours, where in rows_of(page, 5):
        place = re.fullmatch(r"`([\w/]+)\.py:([A-Z_]+)`", where)
        if place and name != "tiers Hard/Medium/Easy, percent":
            module = importlib.import_module(place[1].replace("/", "."))
            assert float(ours) == getattr(module, place[2]), name


def test_expected_numbers_are_those_of_the_runs():
    lines = expected.table(json.loads(expected.RESULT.read_text()))
    assert "\n".join(lines) in (ROOT / "docs" / "expected.md").read_text()


# ---- words


BANNED = r"\b(is|are) told\b|\btells in\b|\bwhat nobody\b|\bgoes on\b|\bgo on\b"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_plain_words(page):
    found = re.findall(f".*(?:{BANNED}).*", page.read_text())
    assert not found
