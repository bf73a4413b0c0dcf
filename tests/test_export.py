"""
export.py: a merged thinker, a whole Omni checkpoint, and what rounding leaves of an update.

    python -m pytest tests/test_export.py
"""

import importlib.util
import json
import shutil

import pytest
import torch
from benchmark_fixtures import media  # noqa: F401
from conftest import RECIPE, assert_same_values, launch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from whole_omni import write_whole_omni

import export
import toy
from data.rows import Rows, normalize_row
from models.inputs import InputBuilder
from models.loading import load_policy
from models.policy import completion_logprobs
from teachers import client

SERVES = all(importlib.util.find_spec(m) for m in ("fastapi", "uvicorn", "openai", "soundfile"))


@pytest.fixture(scope="module")
def trained(toy_dir, tmp_path_factory):
    """A whole Omni of random talker and vocoder, and a run of two steps with LoRA on its thinker."""
    folder = tmp_path_factory.mktemp("export")
    write_whole_omni(toy_dir / "model", folder / "base")
    launch(
        "train_sft.py",
        *("--model", folder / "base", "--data", toy_dir / "stage0" / "train.jsonl"),
        *("--out", folder / "run", "--steps", 2, "--batch-size", 4, "--micro-tokens", 4096),
        *("--lora-rank", 4, "--lr", 1e-2, "--save-every", 0),
    )
    return folder


@pytest.fixture(scope="module")
def prompt(toy_dir, tmp_path_factory, media):  # noqa: F811
    """A prompt with an image and a sound, and some completions of it."""
    folder = tmp_path_factory.mktemp("media")
    media(folder / "p.png", "picture")
    media(folder / "s.wav", "sound")
    row = dict(prompt_id="x", question="What is it?", answer="a", answer_type="text")
    row = normalize_row(row | dict(images=["p.png"], audio="s.wav"))
    generator = torch.Generator().manual_seed(0)
    completions = [torch.randint(10, 250, (n,), generator=generator) for n in (7, 12)]
    return InputBuilder(toy_dir / "model", RECIPE, folder, False)(row), completions


def our_logprobs(folder, prompt):
    """Of each token of both completions, by our packed forward."""
    policy = load_policy(folder, 0, False)
    with torch.no_grad():
        logprobs, mask, *_ = completion_logprobs(policy, [prompt[0]], [prompt[1]], 1.0)
    return logprobs[mask]


def their_logprobs(thinker, prompt):
    """The same by the model's own forward, one completion at a time."""
    (prompt, completions), logprobs = prompt, []
    mel = prompt.media["audio"]["mel"]
    for completion in completions:
        ids = torch.cat([prompt.input_ids, completion])[None]
        with torch.no_grad():
            logits = thinker(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                input_features=mel[None],
                feature_attention_mask=torch.ones(1, mel.shape[1], dtype=torch.long),
                pixel_values=prompt.media["image"]["pixels"],
                image_grid_thw=prompt.media["image"]["grid"],
            ).logits[0, len(prompt.input_ids) - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(logprobs)


def read_weights(folder):
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def files_of(folder):
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}


# ---- a whole checkpoint


def test_a_whole_checkpoint(trained, prompt, tmp_path):
    out = tmp_path / "whole"
    printed = launch("export.py", trained / "run", out, "--full", trained / "base")
    assert "survives" in printed and "bfloat16" in printed

    # everything that is not the thinker is the base's, byte for byte
    base_files, files = files_of(trained / "base"), files_of(out)
    assert set(files) == set(base_files) and "spk_dict.pt" in files
    for name, path in files.items():
        if not name.endswith(".safetensors"):
            assert path.read_bytes() == base_files[name].read_bytes()
    base_weights, weights = read_weights(trained / "base"), read_weights(out)
    assert set(weights) == set(base_weights)
    changed = {n for n in weights if not torch.equal(weights[n], base_weights[n])}
    assert changed and all(name.startswith("thinker.") for name in changed)
    assert all(weights[name].dtype == base_weights[name].dtype for name in weights)

    # transformers' whole class: nothing missing, nothing left over
    load = PreTrainedModel.from_pretrained.__func__
    _, report = load(Qwen2_5OmniForConditionalGeneration, out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    whole = Qwen2_5OmniForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    assert whole.speaker_map
    ours = our_logprobs(out, prompt)
    assert_same_values(their_logprobs(whole.thinker, prompt), ours)
    assert (ours - our_logprobs(trained / "base", prompt)).abs().max() > 0.01  # it has learnt


def test_in_float32_nothing_is_lost(trained, prompt, tmp_path):
    out = tmp_path / "whole"
    flags = ("--full", trained / "base", "--dtype", "float32")
    assert "100.0% of what was learnt" in launch("export.py", trained / "run", out, *flags)
    whole = Qwen2_5OmniForConditionalGeneration.from_pretrained(out)
    assert whole.thinker.dtype == torch.float32
    ours = our_logprobs(trained / "run" / "final", prompt)
    assert_same_values(their_logprobs(whole.thinker, prompt), ours)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_weights(out))


# ---- a thinker


def test_a_merged_thinker(trained, prompt, toy_dir, tmp_path):
    out = tmp_path / "thinker"
    launch("export.py", trained / "run", out, "--dtype", "float32")
    load = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained
    thinker, report = load(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["tie_word_embeddings"] is config["tie_word_embeddings"] is False
    ours = our_logprobs(trained / "run" / "final", prompt)
    assert_same_values(their_logprobs(thinker, prompt), ours)

    # as PEFT computes it, adapter beside the weights
    from peft import PeftModel

    base = load(trained / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, trained / "run" / "final").get_base_model()
    assert_same_values(their_logprobs(adapted, prompt), ours)

    # and our own commands take the folder
    clip = toy_dir / "stage2" / "clips" / "test-00000.mp4"
    replies = []
    for model in (out, trained / "run"):  # of the run, the adapter stays beside its base
        words = (clip, "What?", "--model", model, "--max-new-tokens", 8, "--json")
        replies.append(json.loads(launch("ask.py", *words))["completion"])
    assert replies[0] == replies[1]


def test_a_run_that_trains_all_weights(toy_dir, tmp_path):
    shutil.copytree(toy_dir / "model", tmp_path / "start")
    launch(
        "train_sft.py",
        *("--model", tmp_path / "start", "--data", toy_dir / "stage0" / "train.jsonl"),
        *("--out", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--save-every", 0),
        *("--lora-rank", 0, "--lr", 1e-6),
    )
    printed = launch("export.py", tmp_path / "run", tmp_path / "a")
    assert "float32: 100.0%" in printed  # the start's own format
    printed = launch("export.py", tmp_path / "run", tmp_path / "b", "--dtype", "bfloat16")
    assert "--dtype float32" in printed  # 1e-6 is far below a step of bfloat16
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16


def test_adapters_of_experts(toy_dir, tmp_path):
    toy.make_model(tmp_path / "start", None, "qwen3")
    launch(
        "train_sft.py",
        *("--model", tmp_path / "start", "--data", toy_dir / "stage0" / "train.jsonl"),
        *("--out", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--save-every", 0),
        *("--lora-rank", 2, "--lora-experts", "--lr", 1e-2),
    )
    assert "100.0% of what was learnt" in launch("export.py", tmp_path / "run", tmp_path / "out")
    rows = Rows(toy_dir / "stage2" / "test.jsonl")
    build = InputBuilder(tmp_path / "start", RECIPE, rows.path.parent, False)
    prompt = build(rows[0]), [torch.arange(10, 22)]
    before, trained, exported = (
        our_logprobs(tmp_path / name, prompt) for name in ("start", "run", "out")
    )
    assert_same_values(exported, trained)
    assert (trained - before).abs().max() > 1e-3


@pytest.mark.skipif(not SERVES, reason="transformers serve needs requirements-test.txt")
def test_transformers_serve_answers_as_we_do(trained, toy_dir, tmp_path):
    from servers import transformers_serve

    out = tmp_path / "thinker"
    launch("export.py", trained / "run", out)
    row = json.loads((toy_dir / "stage2" / "test.jsonl").read_text().splitlines()[0])
    row = normalize_row(row)
    replies = []
    with transformers_serve() as url:
        for where, model_name in ((url, str(out)), (str(out), None)):
            model = client.FrozenModel(
                where,
                model_name=model_name,
                media_folder=toy_dir / "stage2",
                media_config=RECIPE,
                cache_dir=tmp_path / "answers",
                timeout=60.0,
                max_retries=2,
            )
            replies.append(
                model.query(row, "What?", modalities=("frames", "audio"), max_tokens=16, parse=str)
            )
    assert replies[0] == replies[1] != ""


# ---- rounding


def test_survival_by_hand():
    ones = dict(w=torch.ones(2, 2))
    step = 2.0**-7  # of bfloat16, between 1 and 2
    for update, dtype, expected in (
        (step, torch.bfloat16, (1.0, 0.0)),
        (step / 4, torch.bfloat16, (0.0, 0.0)),
        (step / 4, torch.float32, (1.0, 0.0)),
        (step * 3 / 4, torch.bfloat16, (4 / 3, 0.0)),  # rounded up
        (0.0, torch.bfloat16, (None, None)),
    ):
        assert export.survival(ones, dict(w=ones["w"] + update), dtype) == pytest.approx(expected)
    # half of it arrives: the update is (s, s/4), and (s, 0) is left
    after = dict(w=torch.ones(2) + torch.tensor([step, step / 4]))
    share, noise = export.survival(dict(w=torch.ones(2)), after, torch.bfloat16)
    assert share == pytest.approx(16 / 17) and noise == pytest.approx(4 / 17)


# ---- mistakes


def test_mistakes_are_one_line(trained, toy_dir, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    shutil.copytree(trained / "base", tmp_path / "narrow")
    for file in (tmp_path / "narrow").glob("*.safetensors"):
        weights = {name: x[: len(x) // 2].clone() for name, x in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    launch("toy.py", "--out", tmp_path / "ola", "--backbone", "ola", "--random-init", "--stages")
    run, out = trained / "run", tmp_path / "out"
    for words, problem in (
        ((run, tmp_path / "there"), "already exists"),
        ((tmp_path / "nowhere", out), "no model at"),
        ((tmp_path / "unfinished", out), "no final/"),
        ((run, out, "--full", tmp_path / "nowhere"), "no model at"),
        ((run, out, "--full", toy_dir / "model"), "whole checkpoint"),
        ((run, out, "--full", tmp_path / "narrow"), "other shapes"),
        ((tmp_path / "ola" / "model", out, "--full", trained / "base"), "Ola"),
    ):
        printed = launch("export.py", *words, code=1)
        assert "Traceback" not in printed and problem in printed.strip().splitlines()[-1]
        assert not out.exists() and not list(tmp_path.glob("*.part"))  # nothing is left
