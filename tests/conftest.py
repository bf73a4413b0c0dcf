"""What the tests share: the repository on the path, and one small toy for the whole run."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # their figures are float32's, on a CPU

import run  # before torch: it sets how torch's threads wait
from run import ending

import pytest  # noqa: E402

import torch  # noqa: E402

from rows import data  # noqa: E402
from rows.clips import BadRow  # noqa: E402
from omni import model  # noqa: E402
import toy  # noqa: E402

RECIPE = data.Recipe(
    fps=2.0, max_frames=16, max_pixels=56 * 56, max_audio_seconds=8.0, max_prompt_tokens=2048
)


@pytest.fixture(scope="session")
def toy_dir(tmp_path_factory):
    """A folder with model/ and stage0..3/, real mp4 clips, few rows."""
    folder = tmp_path_factory.mktemp("toy")
    toy.write_model(folder / "model", toy.WEIGHTS if toy.WEIGHTS.exists() else None)
    for stage in range(4):
        toy.write_rows(folder / f"stage{stage}", stage, num_train=16, num_test=8, seed=0)
    return folder


def toy_prompts(toy_dir):
    """-> prompts with sound and without, of different lengths; what built the last of them."""
    prompts = []
    for stage, i in ((3, 0), (1, 0), (2, 1)):
        rows = data.Rows(toy_dir / f"stage{stage}" / "train.jsonl")
        build = model.InputBuilder(toy_dir / "model", RECIPE, rows.path.parent, False)
        prompts.append(build(rows[i]))
    return prompts, build


def random_completions(sizes, seed=0):
    """Ragged completions of ordinary tokens (ids from 10 on: none is a special token)."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(10, 250, (n,), generator=generator) for n in group] for group in sizes]


def launch(script, *flags, code=0, processes=1):
    """
    Runs a script as `python script flags` does -> what it printed. One process runs in this one,
    which saves the seconds of importing; several run under torchrun.
    """
    argv = [str(word) for word in (script, *flags)]
    if processes > 1:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",  # a port of its own
            "--nproc-per-node",
            str(processes),
        ]
        done = subprocess.run([*torchrun, *argv], cwd=ROOT, capture_output=True, text=True)
        printed, status = done.stdout + done.stderr, done.returncode
    else:
        out, status = io.StringIO(), 0
        with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            try:
                module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
                ending.main_guard(module.main, BadRow)
            except SystemExit as end:
                status = end.code
        printed = out.getvalue()
        if isinstance(status, str):  # sys.exit(text) prints it and exits with 1
            printed, status = printed + status + "\n", 1
    assert bool(status) == bool(code), printed
    return printed
