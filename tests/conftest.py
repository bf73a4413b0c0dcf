"""What the tests share: the repository on the path, and one small toy for the whole run."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import run.before_torch  # noqa: F401  must come before torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # their figures are float32's, on a CPU


import pytest  # noqa: E402
import spawned  # noqa: E402
import torch  # noqa: E402
from media_files import RECIPE, media  # noqa: E402, F401  media is a fixture

import toy  # noqa: E402
from data.clips import BadRow
from data.rows import Rows
from data.toy_rows import write_rows
from models.inputs import InputBuilder
from models.toy_model import write_model
from run.launch import run_main
from training import page

SLOW_FIRST = (
    "faults nodes ola run reproducible page teachers train_rl judge eval benchmarks".split()
)


def pytest_collection_modifyitems(items):
    """Slow files begin first, so that no worker waits for another's last one."""

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return SLOW_FIRST.index(name) if name in SLOW_FIRST else len(SLOW_FIRST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def only_its_own_tests_draw_pages(request, monkeypatch):
    """Drawing the page takes half a second of CPU at the end of every run."""
    if request.path.stem != "test_page":
        monkeypatch.setattr(page, "write", lambda *_: None)


@pytest.fixture(scope="session")
def toy_dir(tmp_path_factory):
    """A folder with model/ and stage0..3/, real mp4 clips, few rows."""
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "model", toy.WEIGHTS if toy.WEIGHTS.exists() else None)
    for stage in range(4):
        write_rows(folder / f"stage{stage}", stage, num_train=16, num_test=8, seed=0)
    return folder


def toy_prompts(toy_dir):
    """-> prompts with sound and without, of different lengths; what built the last of them."""
    prompts = []
    for stage, i in ((3, 0), (1, 0), (2, 1)):
        rows = Rows(toy_dir / f"stage{stage}" / "train.jsonl")
        build = InputBuilder(toy_dir / "model", RECIPE, rows.path.parent, False)
        prompts.append(build(rows[i]))
    return prompts, build


def random_completions(sizes, seed=0):
    """Ragged completions of ordinary tokens (ids from 10 on: none is a special token)."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(10, 250, (n,), generator=generator) for n in group] for group in sizes]


def assert_same_values(ours, theirs, rel=1e-5, **kwargs):
    """
    Equal up to the rounding of float32: within `rel` of the largest value, or of 1 where all are smaller.
    Other processors have other kernels, which sum in another order: the error grows with the values.
    """
    size = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=rel * size, rtol=0, **kwargs)


def launch(script, *flags, code=0, processes=1):
    """
    Runs a script as `python script flags` does -> what it printed. One process runs in this one,
    which saves the seconds of importing; several are forked (spawned.py).
    """
    argv = [str(word) for word in (script, *flags)]
    if processes > 1:
        running = spawned.start(*argv, processes=processes)
        printed = running.communicate()
        status = running.returncode
    else:
        out, status = io.StringIO(), 0
        with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            try:
                module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
                run_main(module.main, BadRow)
            except SystemExit as end:
                status = end.code
        printed = out.getvalue()
        if isinstance(status, str):  # sys.exit(text) prints it and exits with 1
            printed, status = printed + status + "\n", 1
    assert bool(status) == bool(code), printed
    return printed


needs_browser = pytest.mark.skipif(
    not find_spec("PySide6"), reason="needs a browser: pip install PySide6"
)


def in_browser(path, expression):
    """
    What a JavaScript expression is worth in the page, opened in a real headless browser, in whose console no
    error may stand.
    """
    command = [sys.executable, Path(__file__).with_name("browser.py"), path, expression]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Numbers:
    """Stands for an InputBuilder: a row's clip is its number, 25 times, and the hint comes with it."""

    def __init__(self, broken=()):
        self.broken, self.loads, self.threads = set(broken), [], set()

    def __call__(self, row, hint=None):
        self.threads.add(threading.current_thread())
        self.loads.append(row["prompt_id"])
        if row["prompt_id"] in self.broken:
            raise BadRow(f"row {row['prompt_id']}: broken")
        return torch.full((25,), float(row["prompt_id"]))  # 100 bytes

    def with_text(self, inputs, row, hint=None):
        return inputs, hint


def rows_of(count):
    return [dict(prompt_id=str(i), video=f"{i}.mp4") for i in range(count)]
