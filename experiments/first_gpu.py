"""
A first run on a GPU: checks there what the tests check on a CPU, and measures where the time goes, the
most valuable first. It needs one GPU and eight minutes. The model is a text model of the 7B's shape with
random weights and a LoRA adapter, placed as train_rl.py places it.

    python -m experiments.first_gpu first_gpu.json            # on a GPU
    python -m experiments.first_gpu first_gpu.json --tiny     # a dry run, also on a CPU

The result of a step is on the disk before the next begins. A step that fails does not stop the others;
its error is its result. The plain way, at the end, is the same model with transformers'
attention: copies of the prompt and full logits, `generate` for the rollout.

P prompt tokens, C completion tokens, G completions of a prompt, B prompts.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import faulthandler
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from experiments import bench
from experiments.gpu_attention import decode_is_right, packed_is_right, packed_ms, random, timed
from experiments.gpu_estimates import VISION
from experiments.gpu_rounding import adapter_arrives, head_gap, tower
from models import graphs, sharding
from models.graphs import capture
from models.loading import wrap_policy
from models.policy import completion_logprobs
from run import arguments, checkpoint, optim, processes
from run.io import REPOSITORY, write_text
from run.launch import run_main
from run.run_dir import git_commit, installed_version

LIMIT = 480  # seconds, after which no step begins; a minute later a step that hangs is cut off
PACKAGES = ["transformers", "peft", "triton", "numpy"]  # whose versions are noted
SHAPE = dict(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, vocab=152064)
TINY = dict(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, vocab=512)
STEP = argparse.Namespace(  # the flags of train_rl.py that a gradient reads
    algo="avatar",
    micro_tokens=16384,
    kl_coef=0.1,
    temperature=1.0,
    clip_eps=0.2,
    tas_shape="parabolic",
    tas_lambda=0.3,
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    parser.add_argument("out", help="file for all results, JSON")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: half a minute on a CPU")
    return parser.parse_args(argv)


def begin(tiny):
    """The namespace that every step gets: sizes, the device, the policy when one of them has built it."""
    on_gpu = torch.cuda.is_available()
    shape = TINY if tiny else SHAPE
    size = dict(P=96, C=8, G=4, few=4) if tiny else dict(P=8192, C=512, G=8, few=48)
    at = SimpleNamespace(**shape, **size, tiny=tiny, on_gpu=on_gpu)
    at.device = "cuda" if on_gpu else "cpu"
    at.dtype = torch.bfloat16 if on_gpu else torch.float32
    at.width = at.hidden // at.heads
    at.sync = torch.cuda.synchronize if on_gpu else do_nothing
    return at


def do_nothing():
    pass


# ---- the machine -------------------------------------------------------------------------------


def ceilings(at):
    """What the card does at best: a large matrix product, a large copy (reading and writing)."""
    size, num_bytes = (512, 2**22) if at.tiny else (8192, 2**31)
    a, b = random(at, size, size), random(at, size, size)
    source = torch.zeros(num_bytes, device=at.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    at.tflops = 2 * size**3 / timed(at, lambda: a @ b) / 1e9
    at.gb_per_s = 2 * num_bytes / timed(at, lambda: target.copy_(source)) / 1e6
    result = dict(tflops=at.tflops, gb_per_s=at.gb_per_s)
    if at.on_gpu:
        result["gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
        result["capability"] = torch.cuda.get_device_capability()
    return result


def host_copies(at):
    """Features of a clip to the host and back, without a wait in between."""
    features = random(at, at.P // 2, at.hidden)
    pinned = sharding.on_host(features)
    back = pinned.to(features, non_blocking=True)
    pageable = features.cpu()
    ms = timed(at, lambda: pinned.to(features, non_blocking=True))
    pageable_ms = timed(at, lambda: pageable.to(features))
    return dict(same=torch.equal(back, features), ms=ms, pageable_ms=pageable_ms)


# ---- the model ---------------------------------------------------------------------------------


def build_policy(at):
    """The text model on its device, as a policy that trains."""
    config = bench.thinker_config(
        hidden=at.hidden,
        intermediate=at.intermediate,
        layers=at.layers,
        heads=at.heads,
        kv_heads=at.kv_heads,
        vocab=at.vocab,
    )
    if not at.tiny:  # the true vision tower
        for name, value in VISION.items():
            setattr(config.vision_config, name, value)
        config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    torch.manual_seed(0)
    with torch.device(at.device):
        thinker = Thinker(config)
    policy = wrap_policy(thinker, 16, train_towers=False)
    return sharding.to_device(policy, torch.device(at.device), "auto")


def build(at):
    """NCCL with one process, FSDP, LoRA. All else needs it, so there is a second way to begin."""
    problem = None
    try:
        processes.init("auto")
    except Exception as error:
        problem = repr(error)[:400]
        dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29517", rank=0, world_size=1)
    at.policy = build_policy(at)
    weights = sum(p.numel() for p in at.policy.parameters())
    trained = sum(p.numel() for p in at.policy.parameters() if p.requires_grad)
    return dict(billions=weights / 1e9, trained_millions=trained / 1e6, not_by_hash_store=problem)


def two_processes(at):
    """What collectives.py finds; on GPUs it needs two of them."""
    if at.on_gpu and torch.cuda.device_count() < 2:
        return "left out: one GPU"
    words = "-m torch.distributed.run --standalone --nproc-per-node 2 -m experiments.collectives"
    done = subprocess.run(
        [sys.executable, *words.split()],
        cwd=REPOSITORY,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        return dict(error=done.stderr[-1500:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def eager(decode, inputs):
    """In the place of capture: no CUDA graph."""
    return decode


def logprob_gap(at):
    """Log-probs of a rollout, with and without its graph, against the recomputed ones; nats."""
    prompts, _ = bench.make_inputs(at.vocab, at.P // 4, 1, 1, 2)
    result = {}
    for name, record in (("graph", capture), ("eager", eager)):
        with patch("models.rollout.capture", record):
            rolled = bench.rollout_ours(at.policy, prompts, at.G, at.few)
        ids = [[c.ids for c in group] for group in rolled]
        with torch.no_grad():
            logprobs, _, _ = completion_logprobs(at.policy, prompts, ids, 1.0)
        sampled = torch.stack([c.logprobs for group in rolled for c in group]).to(logprobs)
        gap = (logprobs - sampled).abs()
        result[name] = dict(max=gap.max().item(), mean=gap.mean().item())
    return result


def update(at):
    """Seconds, the share of the card's ceiling, the dearest kernels with their calls and ms."""
    size = at.P, at.C, at.G
    task = partial(bench.update_ours, at.policy, *bench.make_inputs(at.vocab, *size))
    seconds = timed(at, task, repeats=2, warm_up=1) / 1e3
    flops = bench.update_flops(at.policy.thinker.config.text_config, size, per_weight=4)
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA if at.on_gpu else activity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        task()
        at.sync()
    kind = "self_device_time_total" if at.on_gpu else "self_cpu_time_total"
    kernels = [(e.key[:90], e.count, getattr(e, kind) / 1e3) for e in profile.key_averages()]
    kernels.sort(key=lambda kernel: -kernel[2])
    return dict(
        seconds=seconds,
        tokens_per_s=(at.P + at.G * at.C) / seconds,
        matmul_share=flops / seconds / 1e12 / at.tflops,  # without what is computed again
        kernels=kernels[:25],
    )


def decode(at, num_prompts):
    """Seconds of reading the prompts, ms of a token, seconds of each recording."""
    prompts, _ = bench.make_inputs(at.vocab, at.P, 1, 1, num_prompts)
    recordings = []
    count = at.few * 2 + 1

    def timed_capture(decode, inputs):
        at.sync()
        began = time.perf_counter()
        graph = capture(decode, inputs)
        at.sync()
        recordings.append(time.perf_counter() - began)
        return graph

    task = partial(bench.rollout_ours, at.policy, prompts, at.G)
    prefill_ms = timed(at, partial(task, 1), 1, 1)
    with patch("models.rollout.capture", timed_capture):
        all_ms = timed(at, partial(task, count), 1, 0)
    token_ms = (all_ms - sum(recordings) * 1e3 - prefill_ms) / (count - 1)
    # a token of all rows reads every weight, every prompt's keys and values, and the rows' own
    per_token = 2 * at.layers * at.kv_heads * at.width
    cached = per_token * num_prompts * (at.P + at.G * count / 2)
    weights = sum(bench.matrices(at.policy.thinker.config.text_config))
    moved = (weights + cached) * torch.finfo(at.dtype).bits / 8
    return dict(
        prefill_s=prefill_ms / 1e3,
        token_ms=token_ms,
        recordings_s=recordings,
        bandwidth_share=moved / token_ms / 1e6 / at.gb_per_s,
        no_graph=[str(error) for error in graphs._capture_errors],
    )


def whole_step(at):
    """Rollout, reference, update, AdamW; then a checkpoint, saved and loaded again."""
    optimizer = optim.adamw(at.policy, 1e-5)
    prompts, _ = bench.make_inputs(at.vocab, at.P, 1, 1, 2)
    size = (at.P, at.few, at.G, 2)
    step = partial(bench.our_step, STEP, at.policy, None, optimizer, prompts, size, step=1)
    result = dict(step_s=timed(at, step, repeats=1, warm_up=0) / 1e3)
    trained = [p for p in at.policy.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "checkpoints").mkdir()
        parts = dict(policy=at.policy, optimizer=optimizer, state={}, keep_checkpoints=1)
        save = partial(checkpoint.save, out, 1, **parts)
        result["save_s"] = timed(at, save, 1, 0) / 1e3
        for parameter in trained:
            parameter.data.zero_()
        load = partial(checkpoint.load, out, at.policy, optimizer)
        result["load_s"] = timed(at, load, 1, 0) / 1e3
    result["same"] = all(torch.equal(whole(p), whole(q)) for p, q in zip(trained, before))
    return result


def whole(x):
    """A parameter as one tensor, also where FSDP has sharded it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# ---- beside the plain way ----------------------------------------------------------------------


@contextmanager
def plain_attention(policy):
    """The same weights, with transformers' own attention."""
    text = policy.thinker.model.language_model
    text.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        text.set_attn_implementation("shared_prefix")


def plain_update(at):
    """Seconds of an update with copies of the prompt, and of ours; a quarter of the size."""
    inputs = bench.make_inputs(at.vocab, at.P // 4, at.C // 4, at.G)
    ours = timed(at, partial(bench.update_ours, at.policy, *inputs), 2, 1) / 1e3

    def copies():
        task = partial(bench.copies_logprobs, prompts=inputs[0], completions=inputs[1])
        at.policy(lambda policy: task(policy.thinker)).mean().backward()
        at.policy.zero_grad()

    with plain_attention(at.policy):
        theirs = timed(at, copies, 1, 1) / 1e3
    return dict(ours_s=ours, plain_s=theirs, ratio=theirs / ours)


def plain_rollout(at):
    """Seconds of a rollout by `generate`, and of ours."""
    prompts, _ = bench.make_inputs(at.vocab, at.P // 4, 1, 1, 2)
    ours = timed(at, partial(bench.rollout_ours, at.policy, prompts, at.G, at.few), 1, 1) / 1e3

    def generate(policy):
        with sharding.unsharded(policy):
            return bench.rollout_generate(policy.thinker, prompts, at.G, at.few)

    with plain_attention(at.policy), torch.no_grad():
        theirs = timed(at, lambda: at.policy(generate), 1, 0) / 1e3
    return dict(ours_s=ours, plain_s=theirs, ratio=theirs / ours)


STEPS = [  # name, seconds that must be left, function
    ("ceilings", 5, ceilings),
    ("packed attention: right?", 5, packed_is_right),
    ("packed attention: ms", 15, packed_ms),
    ("decode attention, B=1: right? ms", 10, partial(decode_is_right, num_prompts=1)),
    ("decode attention, B=8: right? ms", 10, partial(decode_is_right, num_prompts=8)),
    ("host copies", 5, host_copies),
    ("build: NCCL, FSDP, LoRA", 60, build),
    ("log-probs: the rollout's and the recomputed", 60, logprob_gap),
    ("adapter: what arrives in bfloat16", 20, adapter_arrives),
    ("head: large logits", 5, head_gap),
    ("vision tower: right? ms", 20, tower),
    ("two processes: collectives, FSDP", 60, two_processes),
    ("update: s, kernels", 60, update),
    ("decode, B=1: ms a token, s of recording", 40, partial(decode, num_prompts=1)),
    ("decode, B=8: ms a token, s of recording", 60, partial(decode, num_prompts=8)),
    ("a whole step; a checkpoint", 60, whole_step),
    ("update beside copies", 40, plain_update),
    ("rollout beside generate", 40, plain_rollout),
]


def take(at, least, task, left):
    """-> a step's result, its seconds, GB at its peak."""
    began = time.perf_counter()
    try:
        if left > least:
            result = task(at)
        else:
            result = f"left out: {left:.0f} seconds left of {least}"
    except Exception as error:  # whatever it is, the other steps are worth having
        result = dict(error=repr(error)[:400], at=traceback.format_exc()[-1500:])
    step = dict(found=result, seconds=round(time.perf_counter() - began, 1))
    gc.collect()
    with suppress(RuntimeError):  # a card that has failed once fails in everything
        if at.on_gpu:
            step["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return step


def main():
    args = parse_args()
    began = time.perf_counter()
    faulthandler.dump_traceback_later(LIMIT + 60, exit=True)
    at = begin(args.tiny)
    versions = {name: installed_version(name) for name in PACKAGES}
    versions |= dict(
        torch=torch.__version__, cuda=torch.version.cuda, python=platform.python_version()
    )
    result = dict(
        device=torch.cuda.get_device_name() if at.on_gpu else f"CPU, {platform.machine()}",
        versions=versions,
        commit=git_commit(),
        sizes={name: value for name, value in vars(at).items() if isinstance(value, int)},
        steps={},
    )
    for title, least, task in STEPS:
        left = LIMIT - (time.perf_counter() - began)
        result["steps"][title] = take(at, least, task, left)
        write_text(Path(args.out), json.dumps(result, indent=1, default=str))
        print(title, json.dumps(result["steps"][title], default=str)[:2000], flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(f"wrote {args.out} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
