"""
Stage 0, cold-start SFT: teach the format and the habit of reasoning before RL, on rows with a
`reasoning`. Loss on completion tokens only, each token of the step weighing the same.

    python train_sft.py                                                   # the toy, CPU
    torchrun train_sft.py --model Qwen/Qwen2.5-Omni-7B --data sft.jsonl --out runs/sft          # 1 GPU
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-Omni-7B --data sft.jsonl ...  # 8 GPUs

The towers train along by default: this is the stage in which the model may still learn to see.
"""

import argparse
import itertools
import time

import run  # before torch: it sets how torch's threads wait

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model
import toy


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("F", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {}), allow_abbrev=False)  # fmt: skip
    run.add_flags(parser, out="runs/sft")
    data.add_flags(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="rows a step, over all ranks [U]")
    parser.add_argument("--micro-tokens", type=int, default=8192, help="prompt and completion tokens read at one time")
    parser.add_argument("--lr", type=float, default=1e-5, help="peak learning rate [U]")
    parser.add_argument("--warmup-frac", type=float, default=0.05, help="share of the steps with rising lr (authors' script)")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="AdamW [U]")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping [U]")
    parser.add_argument("--lora-rank", type=int, default=16, help="0 = full fine-tuning (paper: 16)")
    parser.add_argument("--train-towers", action=argparse.BooleanOptionalAction, default=True, help="train the vision and audio towers")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False, help="less memory, a third more time")

    def overrides(first):
        if first.model is None or toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["sft"]

    return run.parse(parser, argv, overrides)


def main():
    args, source = parse_args()
    rank, world_size, device = run.init_processes(args.device)
    is_main = rank == 0
    out = run.open_folder(args, source, is_main)
    if args.batch_size % world_size:
        raise run.UserError(f"--batch-size {args.batch_size} must be a multiple of the {world_size} processes")

    # ---- data and model
    if is_main and not (args.model and args.data):
        toy.ensure(stage=0)
    if dist.is_initialized():
        dist.barrier()
    toy_model, toy_rows = (toy.HERE / "toy" / "model", toy.HERE / "toy" / "stage0" / "train.jsonl")
    rows = data.Rows(args.data or toy_rows)
    folder = str(args.model or toy_model)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    build = model.InputBuilder(folder, data.recipe_from(args), rows.path.parent, audio_captions=False)
    policy = model.load(folder, args.lora_rank, args.train_towers, args.gradient_checkpointing)
    policy = run.place(policy, device, dtype)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=args.lr, weight_decay=args.weight_decay)  # fmt: skip
    steps = args.steps or -(-len(rows) // args.batch_size)
    warmup = max(1, round(args.warmup_frac * steps))
    start = 0
    if args.resume and (state := run.load_checkpoint(out, policy, optimizer)):
        start = state["step"]
    if is_main:
        run.cut_log(out / "metrics.jsonl", start)
        print(f"  {len(rows)} rows, {steps} steps of {args.batch_size}, from step {start}")

    reader = data.Reader(build, args.workers, int(args.cache_gb * 1e9))
    order = data.shuffled(len(rows), args.seed, skip=start * args.batch_size)
    batches = (list(itertools.islice(order, args.batch_size))[rank::world_size] for _ in range(start, steps))
    batches = read_ahead(batches, rows, reader)

    # ---- loop
    bar = tqdm(total=steps, initial=start, desc="SFT", disable=None if is_main else True)
    for step in range(start + 1, steps + 1):
        began = time.perf_counter()
        batch = next(batches)
        prompts = [reader.get(row, row.get("hint")) for row in batch]
        data_s = time.perf_counter() - began
        completions = [encode_completion(build.tokenizer, row) for row in batch]
        micro = model.micro_batches([len(p.input_ids) + len(c) for p, c in zip(prompts, completions)], args.micro_tokens)
        num_valid_tokens, num_micro = sum(map(len, completions)), len(micro)
        if world_size > 1:
            counts = run.gather((num_valid_tokens, num_micro))
            num_valid_tokens, num_micro = sum(c[0] for c in counts), max(c[1] for c in counts)
        loss_sum = torch.zeros((), device=device)
        for i in range(num_micro):  # every rank the same number, or FSDP would wait for ever
            part, weight = (micro[i], 1.0) if i < len(micro) else (micro[0][:1], 0.0)
            logprobs, mask, _ = model.completion_logprobs(policy, [prompts[j] for j in part], [[completions[j]] for j in part], 1.0)
            # the step's tokens over all ranks, so that no split changes the gradient; FSDP averages
            # over ranks, hence world_size
            loss = -weight * (logprobs * mask).sum() / num_valid_tokens
            (loss * world_size).backward()
            loss_sum += loss.detach()
        if world_size > 1:
            dist.all_reduce(loss_sum)
        grad_norm = run.clip_grad_norm(policy, args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * run.lr_scale(step, steps, warmup, cosine=True)
        optimizer.step()
        optimizer.zero_grad()
        step_s = time.perf_counter() - began
        metrics = dict(step=step, loss=loss_sum.item(), grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"],
                       tokens_per_s=num_valid_tokens / step_s, **{"time/data_s": data_s, "time/step_s": step_s})  # fmt: skip
        if is_main:
            run.log(out / "metrics.jsonl", metrics)
            bar.update()
            bar.write(f"step {step:4d}/{steps}  loss {metrics['loss']:.4f}  grad {grad_norm:.2f}  lr {metrics['lr']:.1e}  {step_s:.2f} s (data {data_s:.2f})")  # fmt: skip
        if args.save_every and step % args.save_every == 0:
            run.save_checkpoint(out, step, policy, optimizer, {}, args.keep, is_main)
    bar.close()
    model.save(policy, out / "final", build.processor, is_main)
    if is_main:
        print(f"saved {out / 'final'}: next, python train_rl.py --stage 1 --model {out / 'final'}")


def read_ahead(batches, rows, reader):
    """Yields batches of rows; the one after each is already being decoded."""
    ahead = None
    for batch in itertools.chain(batches, [None]):
        batch = batch and [rows[i] for i in batch]
        for row in batch or ():
            if not row.get("reasoning"):
                raise data.BadRow(f"row {row['prompt_id']}: no reasoning: stage 0 learns from it")
            reader.prefetch(row, row.get("hint"))
        if ahead:
            yield ahead
        ahead = batch


def encode_completion(tokenizer, row):
    """The reasoning and answer as tokens, with the end token that the rollout stops at."""
    return torch.tensor([*tokenizer(data.completion_text(row)).input_ids, tokenizer.eos_token_id])


if __name__ == "__main__":
    run.main_guard(main)
