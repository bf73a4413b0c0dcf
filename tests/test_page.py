"""
A run to look at: its page, in a real browser where there is one; what --log gives to trackers.

    python -m pytest tests/test_page.py
"""

import base64
import json
import math
import re
import shutil
import struct
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import in_browser, launch, needs_browser
from test_run import same_weights, stopped_copy, without_times
from test_train_rl import read_metrics, rl_flags

import tas
from grpo import group_advantages
from training import metrics, page, samples

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
HINTS = (
    "--steps",
    4,
    "--prompts-per-step",
    8,
    "--hint-patience",
    1,
    "--hint-kl",
    10,
    "--eval-every",
    2,
    "--save-every",
    2,
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def notes_of(path):
    """What a page says is missing."""
    return re.search(r'<ul id="notes">(.*?)</ul>', path.read_text(encoding="ascii"), re.S)[1]


def data_of(path):
    """The samples in a page."""
    text = path.read_text(encoding="ascii")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def pictures_of(path):
    """-> {title of a chart: its SVG}, of those that are drawn."""
    pattern = r"<img alt='(.*?)' src='data:image/svg\+xml;base64,(.*?)'>"
    found = re.findall(pattern, path.read_text(encoding="ascii"))
    return {title: base64.b64decode(picture).decode() for title, picture in found}


@pytest.fixture(scope="module")
def a_run(toy_dir, tmp_path_factory):
    """A short run with replay and hints, of which every second step is sampled."""
    out = tmp_path_factory.mktemp("page") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "MIN_INTERVAL", 2)
        launch(*rl_flags(toy_dir, 2, out, *HINTS))
    return out


# ---- what a run writes


def test_held_out_accuracy_begins_before_the_first_step(a_run):
    steps, run = read_metrics(a_run), page.read_run(a_run, [])
    at = np.flatnonzero(np.isfinite(run.metrics["eval/acc"]))
    assert run.x["completions"][at[0]] == run.x["seconds"][at[0]] == 0
    assert run.metrics["eval/acc"][at].tolist() == [
        steps[1]["eval/before"],
        steps[1]["eval/acc"],
        steps[3]["eval/acc"],
    ]
    assert "eval/before" not in steps[0]


def test_samples_are_the_steps_own_numbers(a_run):
    found, steps = read(a_run / "samples.jsonl"), read_metrics(a_run)
    groups = {}
    for sample in found:
        groups.setdefault((sample["step"], sample["kind"], sample["prompt_id"]), []).append(sample)
        length = len(sample["tokens"])
        assert "".join(sample["tokens"]) == sample["completion"]
        expected = tas.tas_weights(torch.ones(1, length), "parabolic", 0.3)[0]
        np.testing.assert_allclose(sample["tas_weights"], expected, atol=1e-3)
        assert len(sample["ratios"]) == length and (sample["age"] == 0) == (
            sample["kind"] == "fresh"
        )
        assert bool(sample["hint"]) == sample["hinted"]
    assert {step for step, kind, _ in groups if kind == "replayed"} == {
        3
    }  # of step 1 nothing is stored
    for (step, kind, _), group in groups.items():
        advantages, rewards = ([s[name] for s in group] for name in ("advantage", "reward"))
        ratios = [ratio for s in group for ratio in s["ratios"]]
        if kind == "fresh":
            np.testing.assert_allclose(
                advantages, group_advantages(torch.tensor(rewards)), atol=1e-6
            )
            np.testing.assert_allclose(ratios, 1, atol=1e-3)
        else:  # of one sigma for all of them
            gaps = [s["reward"] - s["mean_reward"] for s in group]
            assert np.ptp([a / g for a, g in zip(advantages, gaps) if abs(g) > 1e-6]) < 1e-3
            assert 1 - 1e-3 > min(ratios) and max(ratios) <= steps[step - 1]["off/ratio_max"] + 1e-3
    assert steps[-1]["hints/entered"] > 0 and any(s["hint"] for s in found)
    clips = read(a_run / "clips.jsonl")
    assert [c["prompt_id"] for c in clips] == list(dict.fromkeys(s["prompt_id"] for s in found))
    assert all(len(c["frames"]) >= 2 and len(c["sounds"]) == 1 for c in clips)


def test_a_letter_of_several_tokens_is_whole(toy_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy_dir / "model")
    text = "red \u00e9 \u65e5\u672c \U0001f600 so blue"
    ids = tokenizer(text).input_ids
    found = samples.pieces(tokenizer, ids)
    assert "".join(found) == text and "" in found and len(found) == len(ids)


def test_a_page_changes_no_bit_and_goes_on_when_resumed(toy_dir, a_run, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MIN_INTERVAL", 2)
    resumed, bare = tmp_path / "resumed", tmp_path / "bare"
    stopped_copy(a_run, resumed, 2)
    launch("train_rl.py", "--out", resumed, "--resume", "--steps", 4)
    for name in ("samples.jsonl", "clips.jsonl"):
        assert (resumed / name).read_text() == (a_run / name).read_text()
    monkeypatch.setattr(samples.SampleLog, "write", lambda *_: None)
    monkeypatch.setattr(page, "write", lambda *_: None)
    launch(*rl_flags(toy_dir, 2, bare, *HINTS))
    assert same_weights(a_run, bare) and not (bare / "index.html").exists()
    assert without_times(read_metrics(a_run)) == without_times(read_metrics(bare))


def test_the_page_is_one_file_and_tells_no_place(a_run, toy_dir):
    text = (a_run / "index.html").read_text(encoding="ascii")
    assert len(text) < page.LIMIT and "default-src 'none'" in text
    pictures = pictures_of(a_run / "index.html")
    text += "".join(pictures.values())
    assert str(a_run.parent) not in text and str(toy_dir) not in text
    # the only addresses are the names of SVG's own vocabularies
    hosts = set(re.findall(r"https?://([\w.]+)", text))
    assert hosts <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}
    assert not re.search(r"(src|href)=['\"]?https?:", text)
    data = data_of(a_run / "index.html")
    assert [step for step, _ in data["samples"]][0] == 1 and not notes_of(a_run / "index.html")
    names = {name for panel in page.RL_PANELS for name in panel.lines}
    assert names <= metrics.METRICS.keys() and len(pictures) > 10


def test_the_curves_of_another_run_and_a_reward_part_of_ones_own(a_run, tmp_path):
    for name in ("mine", "other"):
        shutil.copytree(a_run, tmp_path / name)
    steps = [step | {"rewards/brief": 0.25 * step["step"]} for step in read_metrics(a_run)]
    write(tmp_path / "mine" / "metrics.jsonl", steps)
    launch(
        "training/page.py", tmp_path / "mine", "--against", tmp_path / "other"
    )  # the old spelling
    both = pictures_of(tmp_path / "mine" / "index.html")
    launch("training/page.py", tmp_path / "mine", "--compare", tmp_path / "other")
    assert both == pictures_of(tmp_path / "mine" / "index.html")
    assert "stroke-dasharray" in both["entropy, nats per token"]
    assert "brief" in both["reward"] and "format" in both["reward"]
    alone = pictures_of(page.write(tmp_path / "other"))
    assert "stroke-dasharray" not in alone["entropy, nats per token"]


# ---- what may be wrong with a folder


def test_a_cut_off_an_old_and_an_empty_run_say_what_is_missing(a_run, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(a_run, cut)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (cut / name).write_text((a_run / name).read_text()[:-40])
    (cut / "run.json").write_text('{"arg')
    (cut / "clips.jsonl").write_text("5\nnull\n")
    notes = notes_of(page.write(cut))
    assert "run.json is missing or damaged" in notes and "metrics.jsonl: 1 damaged" in notes
    assert "samples.jsonl: 1 damaged" in notes and "clips.jsonl: 2 damaged" in notes
    old = tmp_path / "old"
    old.mkdir()
    write(
        old / "metrics.jsonl",
        [dict(step=s, reward=math.nan, kl=None, grad_norm="x") for s in (1, 2)],
    )
    write(old / "samples.jsonl", [dict(step=1, prompt_id="q", completion="c", hinted=True)])
    assert "clips.jsonl is missing" in notes_of(page.write(old))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    notes = notes_of(page.write(empty))
    assert "metrics.jsonl is missing" in notes and "samples.jsonl is missing" in notes
    (empty / "metrics.jsonl").write_text("")
    assert "no step is logged yet" in notes_of(page.write(empty))
    printed = launch("training/page.py", tmp_path, code=1)
    assert "is not the folder of a run" in printed and printed.count("\n") == 1


def test_stage_0_has_a_page_too(tmp_path):
    write(tmp_path / "metrics.jsonl", [dict(step=s, loss=1 / s, lr=1e-4) for s in range(1, 9)])
    (tmp_path / "run.json").write_text('{"arguments": {"seed": 0}}')
    pictures = pictures_of(page.write(tmp_path))
    assert list(pictures) == ["loss, nats per token", "learning rate"]
    assert not data_of(tmp_path / "index.html")["samples"]
    assert not notes_of(tmp_path / "index.html")  # that there are no samples is no fault


def test_a_long_curve_keeps_its_spike_and_the_page_stays_small(tmp_path):
    long_run(tmp_path, 10_000)
    run = page.read_run(tmp_path, [])
    y = run.metrics["grad_norm"]
    kept = page.thinned(y)
    assert len(kept) <= 2 * page.NUM_STRETCHES + 2 and y[kept].max() == 77
    assert kept[y[kept].argmax()] == 4999 and {0, 9999} <= set(kept.tolist())
    assert run.x["completions"][-1] == 320_000
    assert run.x["seconds"][-1] == pytest.approx(10_000 * 2.5, rel=0.01)
    path = page.write(tmp_path)
    assert path.stat().st_size < page.LIMIT
    steps = [step for step, _ in data_of(path)["samples"]]
    assert steps[-1] == 9901 and 5 < len(steps) < 100 and "are shown" in notes_of(path)


def test_running_mean_by_hand():
    y = np.array([0.0, 1.0] * 100)  # 200 points: windows of 2 * 4 + 1
    mean = page.running_mean(y)
    assert mean[0] == pytest.approx(2 / 5) and mean[10] == pytest.approx(4 / 9)
    assert page.running_mean(y[:90]) is None and page.running_mean(np.arange(200.0)) is None


def long_run(folder, count):
    """A run folder as long runs leave it, of made-up numbers."""
    rng = np.random.default_rng(0)
    names = sorted({name for panel in page.RL_PANELS for name in panel.lines} - {"eval/acc"})
    noise = rng.random((count, len(names)))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, count + 1):
            report = dict(
                step=step,
                completions_generated=32 * step,
                num_valid_tokens=1000,
                tokens_per_s=400.0,
            )
            report |= dict(zip(names, noise[step - 1].tolist())) | dict(advantage_hist=[3] * 60)
            report |= {"eval/acc": step / count} if step % 100 == 0 else {}
            file.write(json.dumps(report | ({"grad_norm": 77.0} if step == 5000 else {})) + "\n")
    (folder / "run.json").write_text(json.dumps(dict(arguments=dict(steps=count, seed=0))))
    clips, found = [], []
    for step in range(1, count, count // 100):
        q = f"q{step}"
        clips.append(
            dict(
                step=step,
                prompt_id=q,
                frames=["data:image/jpeg;base64," + "A" * 4000] * 6,
                sounds=["data:audio/ogg;base64," + "A" * 32000],
            )
        )
        for kind in ("fresh", "replayed"):
            tokens = [f" word{i}" for i in range(300)]
            one = dict(
                step=step,
                kind=kind,
                prompt_id=q,
                prompt="?",
                completion="".join(tokens),
                tokens=tokens,
                tas_weights=[1.1] * 300,
                ratios=[0.9] * 300,
                reward=1.0,
                advantage=0.5,
                age=7,
                hinted=False,
                reward_parts={},
            )
            found += [one] * 4
    write(folder / "clips.jsonl", clips)
    write(folder / "samples.jsonl", found)


# ---- in a browser


@needs_browser
def test_the_samples_of_a_run_in_a_browser(a_run):
    """They are drawn, the filter works, and the console has no error."""
    seen = in_browser(
        a_run / "index.html",
        """(() => {
        const all = what => [...document.querySelectorAll(what)];
        const found = {
            charts: all('figure img').map(i => i.naturalWidth),
            pictures: all('.clip img').map(i => i.naturalWidth), seconds: all('audio').map(a => a.duration),
            hints: all('.hint').length, articles: all('article').map(a => a.className),
            shades: new Set(all('.tokens span').map(s => getComputedStyle(s).backgroundColor)).size,
            wide: document.documentElement.scrollWidth <= innerWidth,
            readout: document.querySelector('.tokens span').title,
        };
        const choose = (id, value) => {
            const input = document.getElementById(id);
            input.type === 'checkbox' ? input.checked = value : input.value = value;
            input.dispatchEvent(new Event('input', {bubbles: true}));
            return all('article').map(a => a.className);
        };
        found.replayed = choose('kind', 'replayed');
        found.none = choose('words', 'no such words');
        choose('words', ''); choose('kind', '');
        found.step = choose('step', '1');
        choose('step', '');
        found.hinted = [choose('hinted', true).length, all('.hint').length];
        choose('hinted', false); choose('shade', 'ratio');
        found.ratio_shades = new Set(all('.tokens span').map(s => getComputedStyle(s).backgroundColor)).size;
        return found;
    })()""",
    )
    assert len(seen["charts"]) > 10 and all(seen["charts"]) and seen["wide"]
    assert len(seen["pictures"]) >= 6 and all(seen["pictures"])
    assert all(s > 1 for s in seen["seconds"])
    assert {"fresh", "replayed"} == set(seen["articles"]) and seen["hints"] > 0
    assert seen["shades"] > 4 and seen["ratio_shades"] > 1
    assert seen["readout"].startswith("token 0: ") and "weight 1.3" in seen["readout"]
    assert seen["replayed"] and set(seen["replayed"]) == {"replayed"} and seen["none"] == []
    assert set(seen["step"]) == {"fresh"} and seen["hinted"][0] == seen["hinted"][1] > 0


@needs_browser
def test_texts_of_a_run_are_texts_in_a_browser(a_run, tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "|")
    shutil.copytree(a_run, folder)
    keys = ("prompt", "completion", "hint", "truth", "tier", "prompt_id")
    hostile = dict.fromkeys(keys, HOSTILE)
    samples_ = read(a_run / "samples.jsonl")
    samples_ = [s | hostile | dict(tokens=[HOSTILE] * len(s["tokens"])) for s in samples_]
    write(folder / "samples.jsonl", samples_)
    clips = [clip | dict(prompt_id=HOSTILE) for clip in read(a_run / "clips.jsonl")]
    write(folder / "clips.jsonl", clips)
    about = dict(commit=HOSTILE, arguments=dict(stage=HOSTILE, seed="\u65e5 half: \ud83d"))
    (folder / "run.json").write_text(json.dumps(about))
    seen = in_browser(
        page.write(folder),
        """({
        title: document.title, scripts: document.scripts.length, name: document.getElementById('name').textContent,
        about: document.getElementById('about').textContent, strange: document.querySelectorAll('img[src=x]').length,
        tokens: [...document.querySelectorAll('.tokens')].map(t => t.textContent.includes('</script><script>')),
    })""",
    )
    assert seen["title"] == seen["name"] == folder.name
    assert seen["scripts"] == 2 and not seen["strange"]
    assert HOSTILE in seen["about"] and seen["tokens"] and all(seen["tokens"])


@needs_browser
def test_a_page_with_little_in_it_in_a_browser(tmp_path):
    write(tmp_path / "metrics.jsonl", [dict(step=1, reward=1.0)])
    write(tmp_path / "samples.jsonl", [dict(step=1, prompt_id="q", completion="an old sample")])
    seen = in_browser(
        page.write(tmp_path),
        """({notes: document.getElementById('notes').children.length,
        text: document.getElementById('steps').textContent, empty: document.querySelectorAll('.empty').length})""",
    )
    assert seen["notes"] and seen["empty"] and "an old sample" in seen["text"]


# ---- other trackers


def test_a_tracker_that_is_not_installed_is_told(monkeypatch, toy_dir, tmp_path):
    monkeypatch.setattr("run.run_dir.find_spec", lambda name: None)
    said = launch(*rl_flags(toy_dir, 2, tmp_path / "x", "--log", "wandb"), code=1)
    assert "--log wandb: it is not installed: pip install wandb" in said and said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def killed_and_resumed(toy_dir, out, tracker):
    """A run that was stopped at step 3, after the checkpoint of step 2, and went on to step 4."""
    with pytest.MonkeyPatch.context() as patch:
        logged = []

        def end_at_3(report):
            logged.append(report)
            if len(logged) == 3:
                raise KeyboardInterrupt

        patch.setattr(
            "training.guards.StepGuard.stop_if_collapsed", lambda self, report: end_at_3(report)
        )
        flags = ("--steps", 4, "--save-every", 2, "--eval-every", 0, "--log", tracker)
        launch(*rl_flags(toy_dir, 2, out, *flags), code=1)
    launch("train_rl.py", "--out", out, "--resume")
    return read_metrics(out)


@pytest.mark.skipif(
    not find_spec("tensorboard"), reason="needs tensorboard: pip install tensorboard"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_metrics_jsonl_says(toy_dir, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = killed_and_resumed(toy_dir, tmp_path / "x", "tensorboard")
    found = EventAccumulator(
        str(tmp_path / "x" / "tensorboard"), size_guidance=dict(scalars=0)
    ).Reload()
    names = {k for m in steps for k, v in m.items() if isinstance(v, (int, float))} - {"step"}
    assert set(found.Tags()["scalars"]) == names and len(names) > 40
    for name in names:
        expected = [(m["step"], np.float32(m[name])) for m in steps if m.get(name) is not None]
        assert [(e.step, np.float32(e.value)) for e in found.Scalars(name)] == expected, name


@pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb: pip install wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_gets_every_step_once(toy_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    steps = killed_and_resumed(toy_dir, tmp_path / "x", "wandb")
    logged, ids = {}, set()
    for path in sorted((tmp_path / "x" / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path.read_bytes()):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                found = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                assert found["_step"] not in logged
                logged[found["_step"]] = found
    assert len(ids) == 1 and sorted(logged) == [1, 2, 3, 4]
    same = without_times(steps)[3]
    assert all(
        logged[4][k] == v for k, v in same.items() if isinstance(v, float) and math.isfinite(v)
    )


def wandb_records(content):
    """Records of a .wandb file: a log of pieces, each with checksum, length and type, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, part = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(part)
            part = b""
