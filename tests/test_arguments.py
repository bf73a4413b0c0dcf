"""
The flags of the commands: answered before anything slow is loaded.

    python -m pytest tests/test_arguments.py
"""

import argparse
import json
import subprocess
import sys

import pytest
from conftest import ROOT

import eval as evaluation
import toy
import train_rl
import train_sft
from run import arguments, run_dir
from run.errors import Stopped, UserError

COMMANDS = ["toy", "train_sft", "train_rl", "eval", "prepare", "ask", "export"]
FLAGS = {"prepare": ["check", "rows.jsonl"], "ask": ["README.md"], "export": ["run", "out"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_parsed_before_torch_is_loaded(command, tmp_path):
    """A command is cut off where it first imports torch: by then its flags have been parsed."""
    flags = FLAGS.get(command, [])
    if command == "toy":  # without a model in its folder it needs torch before it writes any clip
        flags = ["--out", str(tmp_path)]
    code = f"""
import runpy, sys
sys.argv = ["{command}.py", *{flags}]
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


# ---- where a value comes from


def parser_of_two():
    parser = argparse.ArgumentParser(**arguments.PARSER)
    arguments.add_flags(parser)
    return parser


def test_a_flag_typed_with_its_default_value_is_typed():
    parse = lambda words: arguments.parse(  # noqa: E731
        parser_of_two(), words, lambda first: [("stage 0", dict(out="runs/x", steps=7))]
    )
    args, source = parse(["--seed", "0", "--steps", "7", "--log", "wandb"])
    assert (args.seed, args.steps, args.log) == (0, 7, ["wandb"])
    assert [name for name in source if source[name] == "typed"] == ["steps", "seed", "log"]
    assert source["out"] == "stage 0" and source["device"] is None
    _, source = parse([])
    assert "typed" not in source.values() and source["steps"] == "stage 0"


def test_old_spellings_are_hidden_aliases(capsys):
    args, source = train_sft.parse_args(["--keep", "5", "--out", "x"])
    assert args.keep_checkpoints == 5 and source["keep_checkpoints"] == "typed"
    with pytest.raises(SystemExit):
        train_sft.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "--keep-checkpoints" in printed and "--keep " not in printed
    assert "None" not in printed and "SUPPRESS" not in printed


def test_a_run_of_an_earlier_version_keeps_its_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_rl.py"])
    old = dict(out="x", hint_kl=7.0, max_ratio=3.0, keep=5, lr=0.5)
    about = dict(script="train_rl.py", arguments=old)
    (tmp_path / "run.json").write_text(json.dumps(about))
    args, source, _ = train_rl.parse_args(["--out", str(tmp_path), "--resume"])
    assert (args.hint_kl_threshold, args.max_seq_ratio, args.keep_checkpoints) == (7.0, 3.0, 5)
    assert args.lr == 0.5 and source["lr"] == "run.json" and args.out == str(tmp_path)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_the_folder_of_a_run_has_the_defaults_of_its_final(kind, toy_dir, tmp_path):
    """--model RUN is --model RUN/final in every command."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    if kind == "adapter":
        base = dict(base_model_name_or_path=str(toy_dir / "model"))
        (final / "adapter_config.json").write_text(json.dumps(base))
    else:
        (final / "config.json").write_text((toy_dir / "model" / "config.json").read_text())
    assert toy.is_toy(tmp_path / "run") and toy.is_toy(final)
    for command in (train_rl, train_sft, evaluation):
        parsed = [
            vars(command.parse_args(["--model", str(folder), "--out", "x"])[0]) | dict(model=None)
            for folder in (tmp_path / "run", final)
        ]
        assert parsed[0] == parsed[1] and parsed[0]["max_pixels"] == 64 * 64
    final.joinpath("config.json").unlink(missing_ok=True)
    final.joinpath("adapter_config.json").unlink(missing_ok=True)
    final.rmdir()
    with pytest.raises(UserError, match="has not ended"):
        train_rl.parse_args(["--model", str(tmp_path / "run")])


# ---- what may change when a run is resumed


BEFORE = dict(steps=4, seed=0, lr=1e-3, max_prompt_tokens=130, model="a", keep_checkpoints=2)


def resume(out, num_steps=4, before=BEFORE, **changes):
    about = dict(arguments=before, num_steps=num_steps)
    run_dir.check_resume(out, about, before | changes)


@pytest.fixture
def half(tmp_path):
    """A run that has saved its second step."""
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    return tmp_path


def test_every_flag_that_a_message_names_can_be_changed_with_resume():
    """The flags in messages of ours that stop a run which has begun."""
    remedies = """
        max_frames max_pixels max_audio_seconds max_prompt_tokens max_new_tokens prompts_per_step
        micro_tokens rollout_prompts on_bad_step max_seq_ratio allow_outside judge lr hints attn save_every
    """.split()
    args = vars(train_rl.parse_args(["--out", "x"])[0])
    for name in remedies:
        assert name in args, name
        assert name == "judge" or name in run_dir.FREE + run_dir.FROM_HERE_ON, name


def test_a_changed_limit_is_printed_and_a_changed_seed_is_refused(half, capsys):
    resume(half, max_prompt_tokens=400, keep_checkpoints=9)
    printed = capsys.readouterr().out
    assert "--max-prompt-tokens was 130, is 400" in printed and "keep" not in printed
    with pytest.raises(UserError, match="--seed was 0, is 1"):
        resume(half, seed=1)


def test_the_same_model_by_another_spelling_is_the_same(half, monkeypatch):
    monkeypatch.chdir(half)
    resume(half, model=str(half / "a"))
    with pytest.raises(UserError, match="--model"):
        resume(half, model="b")


def test_a_run_of_one_epoch_can_be_lengthened(half, capsys):
    before = BEFORE | dict(steps=0)
    resume(half, before=before, num_steps=6)
    resume(half, before=before, num_steps=6, steps=6)
    assert capsys.readouterr().out == ""
    resume(half, before=before, num_steps=6, steps=9)
    assert "step 9" in capsys.readouterr().out
    with pytest.raises(UserError, match="--steps was 0, is 5"):
        resume(half, before=before, num_steps=6, steps=5)
    (half / "final").mkdir()
    with pytest.raises(Stopped):
        resume(half, before=before, num_steps=6)
    resume(half, before=before, num_steps=6, steps=9)


def test_a_run_without_a_step_begins_anew_with_any_flags(tmp_path):
    resume(tmp_path, seed=1, max_prompt_tokens=400)
    settings = dict(arguments=dict(device="cpu"), source={}, resume=False, trackers=[])
    (tmp_path / "run.json").write_text("{}")
    run_dir.open_run_dir(tmp_path, **settings)  # nothing is lost: no step was logged
    run_dir.exit_stack.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run.json").write_text('{"arguments": {}}')
    with pytest.raises(UserError, match="--resume"):
        run_dir.open_run_dir(tmp_path, **settings)
    run_dir.exit_stack.close()


# ---- which code ran


def test_a_changed_tree_is_recorded(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True
    )
    monkeypatch.setattr(run_dir, "REPOSITORY", tmp_path)
    assert run_dir.git_commit() is None  # outside git
    git("init", "-q")
    (tmp_path / "experiments/results").mkdir(parents=True)
    (tmp_path / "experiments/results/dense.json").write_text("1\n")
    (tmp_path / "rewards.py").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    commit = run_dir.git_commit()
    assert commit and "modified" not in commit and run_dir.modified_files() == []
    (tmp_path / "experiments/results/dense.json").write_text("2\n")
    (tmp_path / "untracked.txt").write_text("")
    assert run_dir.git_commit() == commit  # neither changes what the code does
    (tmp_path / "rewards.py").write_text("2\n")
    assert run_dir.git_commit() == f"{commit}, modified: rewards.py"
    run_dir.begin_run_dir(tmp_path / "..", arguments={}, step=0, num_steps=1)
    about = json.loads((tmp_path / ".." / "run.json").read_text())
    assert about["modified"] == ["rewards.py"] and about["commit"].startswith(commit)
