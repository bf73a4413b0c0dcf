"""
What the README and docs promise about the code: layers, sizes, flags, tags, places, metrics, commands.

    python -m pytest tests/test_layout.py
"""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from run.errors import UserError
from training import metrics

FOLDERS = "run data models training teachers evaluation experiments".split()
FILES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))])
NAMES = {path: str(path.relative_to(ROOT)) for path in FILES}
SOURCE = {NAMES[path]: path.read_text() for path in FILES}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text() for path in PAGES}
DOCS = "".join(TEXT.values())

PAPER = "grpo tas buffer hints answers rewards".split()
BESIDE = {"rewards.py": ["answers.py"]}  # leaves that need another one beside them
ALONE = [  # files that know nothing of ours: each can be copied as it is
    *(f"{name}.py" for name in PAPER),
    "run/optim.py",
    "run/packing.py",
    "data/clips.py",
    "data/toy_clips.py",
    "models/attention.py",
    "models/head.py",
    "teachers/leaks.py",
    "evaluation/scores.py",
]
COMMANDS = ("train_sft", "train_rl", "eval", "ask", "export", "prepare")
# a layer may import those before it, and itself; the leaves: themselves alone
LAYERS = ["leaf", "run", "data", "models", "above", "toy", "command", "experiments"]


def layer(name):
    folder, _, _ = name.rpartition("/")
    stem = name.removesuffix(".py")
    if folder in ("teachers", "evaluation", "training"):
        return "above"  # beside each other
    if folder:
        return folder
    return "leaf" if stem in PAPER else "command" if stem in COMMANDS else stem


def imports(name):
    """-> dotted names of the modules that a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name):
    """-> files of ours that a file imports."""
    found = set()
    for module in imports(name):
        path = module.replace(".", "/")
        found |= {f for f in (f"{path}.py", f"{path}/__init__.py") if f in SOURCE}
    return found - {name, f"{name.partition('/')[0]}/__init__.py"}


# ---- layers


def test_no_circle():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"a circle: {' -> '.join([*open_, name])}"
        if name not in done:
            open_.append(name)
            for other in sorted(ours(name)):
                visit(other)
            open_.pop()
            done.add(name)

    for name in SOURCE:
        visit(name)


def test_no_arrow_upwards():
    for name in SOURCE:
        for other in ours(name):
            mine, its = (LAYERS.index(layer(n)) for n in (name, other))
            same_folder = name.rpartition("/")[0] == other.rpartition("/")[0] != ""
            above = mine == its and layer(name) == "above"
            beside = other in BESIDE.get(name, [])
            assert its < mine or same_folder or above or beside, f"{name} imports {other}"


def test_layers_that_know_no_model():
    for name in SOURCE:
        if layer(name) in ("leaf", "run", "data"):
            assert not {m.split(".")[0] for m in imports(name)} & {"transformers", "peft"}, name
        if layer(name) in ("leaf", "run"):
            assert not {m.split(".")[0] for m in imports(name)} & {"av", "torchaudio"}, name


def test_commands_do_not_import_each_other():
    for name in SOURCE:
        imported = {other.removesuffix(".py") for other in ours(name)} & set(COMMANDS)
        assert not imported or layer(name) == "experiments", name


def test_the_papers_files_import_only_numpy_and_torch():
    for name in ALONE:
        assert ours(name) == set(BESIDE.get(name, [])), name
    for name in PAPER:
        known = {"numpy", "torch", "answers", *sys.stdlib_module_names}
        assert {m.split(".")[0] for m in imports(f"{name}.py")} <= known, name
        assert "argparse" not in SOURCE[f"{name}.py"], "a leaf has no command line"


def test_each_works_alone(tmp_path):
    """All of them in one process, each from a folder of its own."""
    places = []
    for name in ALONE:
        place = tmp_path / name.replace("/", "-").removesuffix(".py")
        place.mkdir()
        for file in (name, *BESIDE.get(name, [])):
            shutil.copy(ROOT / file, place)
        places.append((str(place), name.rpartition("/")[2].removesuffix(".py")))
    code = f"import importlib, sys\nfor place, name in {places}:\n"
    code += "    sys.path[0] = place\n    importlib.import_module(name)\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PATH": ""})


# ---- flags


def parser_of(name, monkeypatch):
    """-> the parser that a command builds."""
    made = []
    parse = argparse.ArgumentParser.parse_known_args

    def keep(self, *given, **kwargs):
        made.append(self)
        return parse(self, *given, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
    importlib.import_module(name).parse_args(["--out", "x"])
    return made[0]


def test_flags_are_few_and_grouped(monkeypatch):
    parser = parser_of("train_rl", monkeypatch)
    groups = [g for g in parser._action_groups if [a for a in g._group_actions if a.dest != "help"]]
    flags = [a for g in groups for a in g._group_actions if a.dest != "help"]
    assert len(groups) >= 5 and all(len(g._group_actions) <= 18 for g in groups)
    assert all(action.help for action in flags)


@pytest.mark.parametrize("name", ["train_sft", "train_rl", "eval"])
def test_no_flag_is_dead(name):
    parsed = importlib.import_module(name).parse_args(["--out", "x"])[0]
    recipe = importlib.import_module(
        "data.clips"
    ).MediaConfig._fields  # read by name in data/media_flags.py
    code = "".join(SOURCE.values())
    dead = [f for f in vars(parsed) if f not in recipe and not re.search(rf"args\.{f}\b", code)]
    assert not dead


# ---- README and docs


def tags(text):
    return set(re.findall(r"\[([A-Z]+(?:\.[A-Za-z]+)?|[DU][0-9]+)\]", text))


def test_tags_in_code_and_docs_are_the_same():
    assert tags("".join(SOURCE.values())) == tags(TEXT["README.md"] + TEXT["method.md"])


def test_every_place_the_docs_name_exists():
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", DOCS):
        last = name.split(".")[-1]
        assert re.search(rf"^\s*(def|class) {last}\b|^{last} = ", SOURCE[file], re.M), (file, name)
    for file in re.findall(
        r"`((?:run|data|models|training|teachers|evaluation|experiments)/\w+\.py)`", DOCS
    ):
        assert file in SOURCE, file


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_metrics_is_the_code():
    table = dict(re.findall(r"^\| `([\w/]+)` \| (.+) \|$", TEXT["metrics.md"], re.M))
    assert {name: table.get(name) for name in metrics.METRICS} == metrics.METRICS


def commands():
    """-> (page, module, flags) of every command of ours in shell blocks of the README and docs."""
    for page, text in TEXT.items():
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            for command in re.split(r"&&|\n", block.replace("\\\n", " ")):
                words = shlex.split(command, comments=True)
                for i, word in enumerate(words):
                    if word == "-m" and words[i + 1].startswith("experiments."):
                        yield page, words[i + 1], words[i + 2 :]
                    elif word.endswith(".py") and "/" not in word:
                        yield page, word.removesuffix(".py"), words[i + 1 :]
                        break


def test_commands_of_the_docs_parse():
    seen = set()
    for page, name, flags in commands():
        for end in (">", "|", ";"):
            flags = flags[: flags.index(end)] if end in flags else flags
        module = importlib.import_module(name)
        if name == "ask":
            continue  # looks for its clip at once; tests/test_docs.py runs it beside one
        try:
            if hasattr(module, "parse_args"):
                module.parse_args(flags)
        except SystemExit as end:
            raise AssertionError(f"{page}: {name} {shlex.join(flags)}: {end}") from None
        except (UserError, FileNotFoundError):  # of a file that an earlier command writes
            assert any("/" in word and not (ROOT / word).exists() for word in flags), flags
        seen.add(name)
    assert seen >= {"train_sft", "train_rl", "eval", "prepare", "experiments.runs"}


def test_nothing_executes_code_from_a_file():
    for name, text in SOURCE.items():
        assert "trust_remote_code" not in text and "pickle.load" not in text, name
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, name
