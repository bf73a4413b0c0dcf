"""
Stage 0, cold-start SFT: teach the format and the habit of reasoning before RL, on rows with a
`reasoning`. The loss is on completion tokens only; every token of the step weighs the same.

    python train_sft.py                                                             # the toy, CPU
    torchrun train_sft.py --model Qwen/Qwen2.5-Omni-7B --data cot.jsonl --out runs/sft     # 1 GPU
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-Omni-7B --data cot.jsonl

The towers train along by default: this is the stage in which the model may still learn to see.
"""

import argparse
import itertools
import time

import run  # before torch: it sets how torch's threads wait

import torch
import torch.distributed as dist

import data
import model
import toy


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **run.PARSER)
    flag, boolean = parser.add_argument, argparse.BooleanOptionalAction
    run.add_flags(parser)
    data.add_flags(parser)
    flag("--batch-size", type=int, default=64, help="rows a step, over all ranks [U18]")
    flag(
        "--micro-tokens", type=int, default=8192, help="tokens read at one time; less = less memory"
    )
    flag("--lr", type=float, default=1e-5, help="peak learning rate, then a cosine [U18]")
    flag("--warmup-frac", type=float, default=0.05, help="share of steps with rising lr (script)")
    flag("--weight-decay", type=float, default=0.0, help="of AdamW [U18]")
    flag("--max-grad-norm", type=float, default=1.0, help="gradient clipping [U18]")
    flag("--lora-rank", type=int, default=16, help="0 = full fine-tuning (paper: 16)")
    flag("--train-towers", action=boolean, default=True, help="train vision and audio towers too")
    flag("--gradient-checkpointing", action=boolean, default=False, help="less memory, more time")

    def overrides(first):
        yield "stage 0", dict(out="runs/sft", steps=0)
        if toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["sft"]

    args, source = run.parse(parser, argv, overrides)
    run.check_at_least(args, batch_size=1, micro_tokens=1, steps=0, lora_rank=0, keep=1)
    return args, source


def main():
    args, source = parse_args()
    device = run.init_processes(args.device)
    out = run.open_folder(args, source)
    run.check_multiple("--batch-size", args.batch_size)
    toy_model, toy_train, _ = toy.defaults(args, stage=0)

    rows = data.Rows(args.data or toy_train)
    folder = model.start_folder(args.model or toy_model, args.lora_rank, out)
    build = model.InputBuilder(
        folder, data.recipe_from(args), rows.path.parent, audio_captions=False
    )
    policy = model.load(folder, args.lora_rank, args.train_towers, args.gradient_checkpointing)
    policy = run.place(policy, device, args.dtype)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    start = 0
    if args.resume and (state := run.load_checkpoint(out, policy, optimizer)):
        start = state["step"]
    steps = args.steps or -(-len(rows) // args.batch_size)
    run.print0(f"  {len(rows)} rows, {steps} steps of {args.batch_size}, from step {start}")

    reader = data.Reader(build, args.workers, int(args.cache_gb * 1e9))
    order = data.shuffled(len(rows), args.seed, skip=start * args.batch_size)
    mine = run.share(args.batch_size)

    def read_ahead():
        """The next step's rows of this rank; threads begin to decode them."""
        batch = [rows[i] for i in list(itertools.islice(order, args.batch_size))[mine]]
        for row in batch:
            if not row.get("reasoning"):
                raise data.BadRow(f"row {row['prompt_id']}: no reasoning: stage 0 learns from it")
            reader.prefetch(row, row.get("hint"))
        return batch

    # ---- loop
    bar = run.progress(start, steps, "stage 0")
    batch = read_ahead()
    run.begin(out, args, start)
    for step in range(start + 1, steps + 1):
        began = time.perf_counter()
        prompts = [reader.get(row, row.get("hint")) for row in batch]
        completions = [encode_completion(build.tokenizer, row) for row in batch]
        ids = [row["prompt_id"] for row in batch]
        batch = read_ahead() if step < steps else []
        data_s = time.perf_counter() - began

        sizes = [len(p.input_ids) + len(c) for p, c in zip(prompts, completions)]
        packs = run.micro_batches(sizes, args.micro_tokens)
        counts = run.gather((sum(map(len, completions)), len(packs)))
        # of the whole step on all ranks, so that no split of it changes the gradient
        num_valid_tokens, num_packs = sum(n for n, _ in counts), max(n for _, n in counts)
        loss_sum = torch.zeros((), device=device)
        for k in range(num_packs):  # as many on every rank, or FSDP would wait for ever
            pack = packs[min(k, len(packs) - 1)]
            logprobs, _, _ = model.completion_logprobs(
                policy,
                [prompts[i] for i in pack],
                [[completions[i]] for i in pack],
                temperature=1.0,
            )
            loss = -float(k < len(packs)) * logprobs.sum() / num_valid_tokens
            (loss * run.world_size()).backward()  # FSDP takes the mean over ranks
            loss_sum += loss.detach()
        if run.world_size() > 1:
            dist.all_reduce(loss_sum)
        grad_norm = run.clip_grad_norm(policy, args.max_grad_norm, f"step {step}, rows {ids}")
        run.set_lr(optimizer, args.lr, step, steps, args.warmup_frac, cosine=True)
        optimizer.step()
        optimizer.zero_grad()

        step_s = time.perf_counter() - began
        loss, lr = loss_sum.item(), optimizer.param_groups[0]["lr"]
        report = dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr)
        report |= {
            "tokens_per_s": num_valid_tokens / step_s,
            "time/data_s": data_s,
            "time/step_s": step_s,
        }
        run.log(out / "metrics.jsonl", report)
        bar.write(f"step {step:4d}/{steps}  loss {loss:.4f}  grad {grad_norm:.2f}  {step_s:.2f} s")
        bar.update()
        if args.save_every and step % args.save_every == 0:
            run.save_checkpoint(out, step, policy, optimizer, {}, args.keep)
    bar.close()
    model.save(policy, out / "final", build.processor)
    run.print0(f"saved {out / 'final'}")


def encode_completion(tokenizer, row):
    """The reasoning and the answer as tokens, with the end token that a rollout stops at."""
    return torch.tensor([*tokenizer(data.completion_text(row)).input_ids, tokenizer.eos_token_id])


if __name__ == "__main__":
    run.main_guard(main)
