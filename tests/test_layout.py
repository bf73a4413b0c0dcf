"""
What the README promises about the code: imports, sizes, flags, tags, metrics, commands.

    python -m pytest tests/test_layout.py
"""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from run import metrics  # before torch

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))
ENTRY_POINTS = ("train_sft", "train_rl", "eval")
LEAVES = "attention buffer chat grpo hints metrics rewards scores tas".split()
LEAVES_MAY_IMPORT = {"numpy", "torch", *sys.stdlib_module_names}


def imports(path):
    """Names of the modules a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_leaves_import_nothing_of_ours():
    for name in LEAVES:
        assert imports(ROOT / f"{name}.py") <= LEAVES_MAY_IMPORT, name


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_works_alone(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=tmp_path, check=True, env={"PATH": ""}
    )


def test_entry_points_do_not_import_each_other():
    for path in SCRIPTS:
        assert not imports(path) & (set(ENTRY_POINTS) - {path.stem}), path.name


def test_no_file_is_too_long():
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 450, path.name


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_no_flag_is_dead(name):
    """Every flag of an entry point is read somewhere."""
    parsed = importlib.import_module(name).parse_args(["--out", "x"])[0]
    code = "".join(path.read_text() for path in SCRIPTS)
    recipe = importlib.import_module("data").Recipe._fields  # read by name in data.recipe_from
    dead = [f for f in vars(parsed) if f not in recipe and not re.search(rf"args\.{f}\b", code)]
    assert not dead


def tags(text):
    found = set(re.findall(r"\[([A-Z]+(?:\.[A-Za-z]+)?|[DU][0-9]+)\]", text))
    return {t for t in found if t not in ("U",)}


def test_tags_in_code_and_readme_are_the_same():
    code = "".join(path.read_text() for path in SCRIPTS)
    assert tags(code) == tags(README)


def test_every_place_the_readme_names_exists():
    for file, name in re.findall(r"`(\w+\.py):([\w.]+)`", README):
        text = (ROOT / file).read_text()
        last = name.split(".")[-1]
        assert re.search(rf"^\s*(def|class) {last}\b|^{last} = ", text, re.M), f"{file}:{name}"


def test_the_table_of_files_has_every_script():
    table = README.split("## Files")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+\.py)`", table, re.M)) == sorted(p.name for p in SCRIPTS)


def test_metrics_table_is_the_code():
    table = dict(re.findall(r"^\| `([\w/]+)` \| (.+) \|$", README, re.M))
    assert {name: table.get(name) for name in metrics.METRICS} == metrics.METRICS


def commands():
    """Every python command of the README's shell blocks, as argument lists."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for command in re.split(r"&&|\n", block):
            words = shlex.split(command, comments=True)
            script = next((w for w in words if w.endswith(".py")), None)
            if script:
                yield words[words.index(script) :]


def test_readme_commands_parse():
    seen = 0
    for script, *flags in commands():
        module = importlib.import_module(script.removesuffix(".py"))
        if hasattr(module, "parse_args"):
            module.parse_args(flags)
            seen += 1
    assert seen >= 8


def test_nothing_executes_code_from_a_file():
    for path in SCRIPTS:
        text = path.read_text()
        assert "trust_remote_code" not in text and "pickle.load" not in text
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call
