"""
The fast path at the size of Qwen2.5-Omni-7B on one GPU, beside the plain way and beside what the
machine could do at best.

    python -m experiments.bench_gpu      # some minutes on a GPU: tables, and all of it in bench_gpu.json
    python -m experiments.bench_gpu --device cpu --hidden 256 --layers 2 --heads 4 --kv-heads 2 \\
        --vocab 8192 --prompts 256 --new-tokens 16                     # that it runs, anywhere

The text model has random weights and a LoRA adapter of rank 16, and stands as train_rl.py places it:
FSDP, bfloat16, gradient checkpointing. The plain way is the same model with transformers' attention:
8 copies of the prompt and full logits for the update, `generate` for the rollout. What does not fit
is reported as such.

P prompt tokens, C completion tokens, G completions of a prompt, B prompts.
"""

import argparse
import gc
import json
import statistics
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

from run import arguments, ending, files, graphs, processes, sharding  # before torch

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from experiments import bench
from omni import model, rollout

GROUP_SIZE = 8


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    flag = parser.add_argument
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"])
    flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    flag("--out", default="bench_gpu.json", help="all figures")
    flag("--repeats", type=int, default=2, help="runs of ours; the median counts")
    flag("--prompts", type=int, nargs="+", default=[4096, 8192, 16384], help="their lengths, P")
    flag("--new-tokens", type=int, default=512, help="length of a completion, C")
    flag("--no-plain", action="store_true", help="leave out the plain way")
    flag("--lora-rank", type=int, default=16, help="0: every weight trains")
    size = parser.add_argument_group("the text model; its defaults are the 7B's").add_argument
    size("--hidden", type=int, default=3584, help="width")
    size("--intermediate", type=int, help="width of the MLP; default: 37/7 of the other")
    size("--layers", type=int, default=28)
    size("--heads", type=int, default=28)
    size("--kv-heads", type=int, default=4)
    size("--vocab", type=int, default=152064)
    args = parser.parse_args(argv)
    args.intermediate = args.intermediate or args.hidden * 37 // 7
    arguments.check_bounds(args, repeats=1, new_tokens=2)
    return args


def build_policy(args, device):
    sizes = args.hidden, args.intermediate, args.layers, args.heads, args.kv_heads, args.vocab
    torch.manual_seed(0)
    with torch.device(device):
        thinker = Thinker(bench.thinker_config(*sizes))
    policy = model.prepare(thinker, args.lora_rank, train_towers=False)
    return sharding.place(policy, device, args.dtype)


@contextmanager
def plain_attention(policy):
    """The same weights, with transformers' own attention."""
    text = policy.thinker.model.language_model
    text.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        text.set_attn_implementation("shared_prefix")


def update_copies(policy, prompts, completions):
    with plain_attention(policy):
        task = partial(bench.copies_logprobs, prompts=prompts, completions=completions)
        logprobs = policy(lambda policy: task(policy.thinker))
        logprobs.mean().backward()
    policy.zero_grad()


def rollout_generate(policy, prompts, num_tokens):
    def task(policy):
        with sharding.gathered(policy):
            return bench.rollout_generate(policy.thinker, prompts, GROUP_SIZE, num_tokens)

    with plain_attention(policy), torch.no_grad():
        policy(task)


# ---- measuring ---------------------------------------------------------------------------------


def measure(task, repeats, warm_up=1):
    """-> median seconds of a run, GB at its peak; None, None and a printed line if it does not run."""
    seconds, on_gpu = [], torch.cuda.is_available()
    gc.collect()  # what a run before it has left in cycles
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(warm_up + repeats):
            began = time.perf_counter()
            task()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    except RuntimeError as error:  # out of memory is one too
        print("does not run:", str(error).splitlines()[0])
        return None, None
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    return statistics.median(seconds[warm_up:]), peak


def ceilings(args, device):
    """-> TFLOP/s of a large matrix product, GB/s of a large copy (reading and writing)."""
    dtype = processes.compute_dtype(device, args.dtype)
    size, num_bytes = (8192, 2**31) if device.type == "cuda" else (512, 2**28)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    ten = range(10)
    product_s, _ = measure(lambda: [a @ b for _ in ten], args.repeats)
    copy_s, _ = measure(lambda: [target.copy_(source) for _ in ten], args.repeats)
    return 10 * 2 * size**3 / product_s / 1e12, 10 * 2 * num_bytes / copy_s / 1e9


def update_row(args, policy, num_prompt, best_tflops):
    size = num_prompt, args.new_tokens, GROUP_SIZE
    task = partial(bench.update_ours, policy, *bench.make_inputs(args, *size))
    seconds, memory = measure(task, args.repeats)
    row = dict(size=size, seconds=seconds, gb=memory)
    if seconds:
        row["tokens_per_s"] = (num_prompt + GROUP_SIZE * args.new_tokens) / seconds
        # of what has to be computed: what checkpointing computes again is not counted
        config, per_weight = policy.thinker.config.text_config, 4 if args.lora_rank else 6
        flops = bench.update_flops(config, size, per_weight)
        row["matmul_share"] = flops / seconds / 1e12 / best_tflops
    return row


def eager(decode, inputs):
    """In the place of rollout.record: no CUDA graph."""
    return decode


def rollout_row(args, policy, num_prompt, num_prompts, best_gb):
    """The rollout, and a token of it with its CUDA graph and without."""
    prompts, _ = bench.make_inputs(args, num_prompt, 1, 1, num_prompts)
    count, few = args.new_tokens, min(args.new_tokens, 33)
    task = partial(bench.rollout_ours, policy, prompts, GROUP_SIZE)
    prefill_s, _ = measure(partial(task, 1), args.repeats)
    seconds, memory = measure(partial(task, count), args.repeats, warm_up=0)
    row = dict(size=(num_prompt, count, GROUP_SIZE, num_prompts), seconds=seconds, gb=memory)
    if seconds and prefill_s:
        with patch("omni.rollout.record", eager):
            eager_s, _ = measure(partial(task, few), 1)
        row["prefill_s"] = prefill_s
        row["token_ms"] = (seconds - prefill_s) / (count - 1) * 1e3
        row["eager_ms"] = eager_s and (eager_s - prefill_s) / (few - 1) * 1e3
        row["tokens_per_s"] = num_prompts * GROUP_SIZE * count / seconds
        # a token of all rows reads every weight, every prompt's keys and values, and the rows' own
        width = torch.finfo(processes.compute_dtype(policy.device, args.dtype)).bits // 8
        per_token = 2 * args.layers * args.kv_heads * (args.hidden // args.heads)
        cached = per_token * num_prompts * (num_prompt + GROUP_SIZE * count / 2)
        config = policy.thinker.config.text_config
        moved = (sum(bench.matrices(config)) + cached) * width
        row["bw_share"] = moved / row["token_ms"] / 1e6 / best_gb
    return row


def add_plain(args, policy, rows):
    """The plain way of the same, once, row by row, until it does not fit any more."""
    for row in rows:
        row |= dict(plain_s=None, plain_gb=None, ratio=None)
    for row in rows:
        inputs = bench.make_inputs(args, *row["size"])
        if len(row["size"]) == 3:
            task = partial(update_copies, policy, *inputs)
        else:
            task = partial(rollout_generate, policy, inputs[0], args.new_tokens)
        row["plain_s"], row["plain_gb"] = measure(task, 1, warm_up=0)
        if row["plain_s"] is None:
            break
        row["ratio"] = row["seconds"] and row["plain_s"] / row["seconds"]


def logprob_gap(args, policy, num_prompt):
    """Log-probs of the rollout, with and without its graph, against the recomputed: max, mean; nats."""
    prompts, _ = bench.make_inputs(args, num_prompt, 1, 1, 2)
    row = dict(size=(num_prompt, args.new_tokens, GROUP_SIZE, 2))
    for name, record in (("", rollout.record), ("eager_", eager)):
        with patch("omni.rollout.record", record):
            rolled = bench.rollout_ours(policy, prompts, GROUP_SIZE, args.new_tokens)
        ids = [[c.ids for c in group] for group in rolled]
        with torch.no_grad():
            logprobs, _, _ = model.completion_logprobs(policy, prompts, ids, 1.0)
        made = torch.stack([c.logprobs for group in rolled for c in group]).to(logprobs)
        gap = (logprobs - made).abs()
        row |= {f"{name}max": gap.max().item(), f"{name}mean": gap.mean().item()}
    return row


def main():
    args = parse_args()
    device = processes.init(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    policy = build_policy(args, device)
    tflops, gb = ceilings(args, device)
    shape = f"width {args.hidden}, {args.layers} layers, vocabulary {args.vocab}"
    print(f"torch {torch.__version__}, {name}, {shape}, LoRA rank {args.lora_rank}")
    print(f"at best here: {tflops:.4g} TFLOP/s in a matrix product, {gb:.4g} GB/s in a copy")
    result = dict(
        arguments=vars(args), commit=files.commit(), device=name, tflops=tflops, gb_per_s=gb
    )

    def show(part, rows):
        result[part] = rows
        Path(args.out).write_text(json.dumps(result, indent=1))
        bench.print_table(f"{part} P/C/G(/B)", rows)

    rollouts = lambda num_prompts: [  # noqa: E731
        rollout_row(args, policy, num_prompt, num_prompts, gb) for num_prompt in args.prompts
    ]
    parts = {
        "gap": lambda: [logprob_gap(args, policy, args.prompts[0])],
        "update": lambda: [update_row(args, policy, n, tflops) for n in args.prompts],
        "rollout": lambda: rollouts(1),
        "rollout of 8": lambda: rollouts(8),
    }
    for part, measured in parts.items():
        show(part, measured())
    result["no_graph"] = [str(error) for error in graphs._no_graph]  # why there was none, if so
    for part in [] if args.no_plain else list(parts)[1:]:  # last: what does not fit, may do harm
        add_plain(args, policy, result[part])
        show(part, result[part])
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    ending.main_guard(main)
