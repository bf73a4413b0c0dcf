"""
The flags of the commands: answered before anything slow is loaded.

    python -m pytest tests/test_arguments.py
"""

import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = ["toy", "train_sft", "train_rl", "eval", "prepare"]
FLAGS = {"prepare": ["check", "rows.jsonl"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_parsed_before_torch_is_loaded(command):
    """A command is cut off where it first imports torch: by then its flags have been parsed."""
    code = f"""
import runpy, sys
sys.argv = ["{command}.py", *{FLAGS.get(command, [])}]
class Cut:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "torchvision", "torchaudio"):
            import run.arguments
            assert parsed, f"{{name}} is loaded before the flags are parsed"
            sys.exit(0)
parsed = []
import run.arguments
answer = run.arguments.answer_early
def answer_early(parse_args):
    parsed.append(answer(parse_args))
run.arguments.answer_early = answer_early
sys.meta_path.insert(0, Cut())
runpy.run_path("{command}.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_flag_ends_with_a_line(command):
    words = [sys.executable, f"{command}.py", *FLAGS.get(command, []), "--sead", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--sead" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["train_sft", "train_rl", "eval"])
@pytest.mark.parametrize("flag", ["--data", "--model"])
def test_a_missing_file_ends_with_a_line(command, flag, tmp_path):
    words = [sys.executable, f"{command}.py", flag, str(tmp_path / "none" / "x" / "y")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert str(tmp_path) in done.stderr
