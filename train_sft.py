"""
Stage 0, cold-start SFT: teach the format and the habit of reasoning before RL, on rows with a
`reasoning`. The loss is on completion tokens only; every token of the step weighs the same.

    python train_sft.py                                                             # the toy, CPU
    torchrun train_sft.py --model Qwen/Qwen2.5-Omni-7B --data cot.jsonl --out runs/sft     # 1 GPU
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-Omni-7B --data cot.jsonl

The towers train along by default: this is the stage in which the model may still learn to see.
"""

import argparse
import time

import run  # before torch: it sets how torch's threads wait

import torch
import torch.distributed as dist

import checkpoint
import data
import metrics
import model
import optim
import stream
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
    flag("--gradient-checkpointing", action=boolean, default=True, help="less memory, more time")

    def overrides(first):
        yield "stage 0", dict(out="runs/sft", steps=0)
        if toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["sft"]

    args, source = run.parse(parser, argv, overrides)
    run.check_bounds(args, **run.BOUNDS, batch_size=1)
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
    health, start = metrics.Health(max_ratio=0, min_entropy=0), 0
    reader = stream.Reader(build, args.workers, int(args.cache_gb * 1e9))

    def read(row):
        """-> Prompt, completion (T,)"""
        if not row.get("reasoning"):
            raise data.BadRow(f"row {row['prompt_id']}: no reasoning: stage 0 learns from it")
        return reader.get(row, row.get("hint")), encode_completion(build.tokenizer, row)

    source_rows = stream.Stream(
        rows, reader.prefetch, read, args.batch_size, args.seed, args.max_bad_frac
    )
    if args.resume and (state := checkpoint.load(out, policy, optimizer)):
        start, health.state = state["step"], state["health"]
        source_rows.load_state_dict(state["rows"])
    steps = args.steps or -(-len(rows) // args.batch_size)
    run.print0(f"  {len(rows)} rows, {steps} steps of {args.batch_size}, from step {start}")

    # ---- loop
    bar = run.progress(start, steps, "stage 0")
    source_rows.read_ahead()
    run.begin(out, args, start)
    run.watch_signals()
    for step in range(start + 1, steps + 1):
        began = time.perf_counter()
        before_step = dict(health=dict(health.state), rows=source_rows.state_dict())
        step_rows, batch, bad = source_rows.take()
        for problem in bad:
            bar.write(f"step {step:4d}/{steps}  replaced: {problem}")
        prompts, completions = zip(*batch)
        source_rows.read_ahead()
        data_s = time.perf_counter() - began

        sizes = [len(p.input_ids) + len(c) for p, c in zip(prompts, completions)]
        packs = optim.micro_batches(sizes, args.micro_tokens)
        # of the whole step on all ranks, so that no split of it changes the gradient
        num_valid_tokens = sum(run.gather(sum(map(len, completions))))
        loss_sum = torch.zeros((), device=device)
        for pack, counts in run.rounds(packs, packs[-1]):
            logprobs, _, _ = model.completion_logprobs(
                policy,
                [prompts[i] for i in pack],
                [[completions[i]] for i in pack],
                temperature=1.0,
            )
            loss = -float(counts) * logprobs.sum() / num_valid_tokens
            (loss * run.world_size()).backward()  # FSDP takes the mean over ranks
            loss_sum += loss.detach()
        if run.world_size() > 1:
            dist.all_reduce(loss_sum)
        grad_norm = optim.clip_grad_norm(policy, args.max_grad_norm)
        optim.set_lr(optimizer, args.lr, step, steps, args.warmup_frac, cosine=True)
        loss, lr = loss_sum.item(), optimizer.param_groups[0]["lr"]
        if problem := health.bad_step(loss, grad_norm):
            ids = ", ".join(row["prompt_id"] for row in step_rows)
            problem = f"step {step}: {problem}; its rows: {ids}"
            if args.on_bad_step == "stop" or health.state["in_a_row"] >= metrics.PATIENCE:
                before_step["health"]["in_a_row"] = 0
                checkpoint.save(out, step - 1, policy, optimizer, before_step, args.keep)
                raise run.UserError(f"{problem}; {run.after_bad_step()}")
            bar.write(f"skipped: {problem}")
        else:
            optimizer.step()
        optimizer.zero_grad()

        step_s = time.perf_counter() - began
        report = dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr)
        report |= {"steps_skipped": health.state["skipped"], "data/bad_rows": len(source_rows.bad)}
        report |= {
            "tokens_per_s": num_valid_tokens / step_s,
            "time/data_s": data_s,
            "time/step_s": step_s,
        }
        run.log(out / "metrics.jsonl", report)
        bar.write(f"step {step:4d}/{steps}  loss {loss:.4f}  grad {grad_norm:.2f}  {step_s:.2f} s")
        bar.update()
        signal = run.stop_asked()
        if signal or (args.save_every and step % args.save_every == 0):
            state = dict(health=dict(health.state), rows=source_rows.state_dict())
            checkpoint.save(out, step, policy, optimizer, state, args.keep)
        if signal and step < steps:
            line = f"step {step} is saved; go on with: {run.how_to_go_on()}"
            raise run.Stopped(line, 128 + signal)
    bar.close()
    model.save(policy, out / "final", build.processor)
    run.print0(f"saved {out / 'final'}")


def encode_completion(tokenizer, row):
    """The reasoning and the answer as tokens, with the end token that a rollout stops at."""
    return torch.tensor([*tokenizer(data.completion_text(row)).input_ids, tokenizer.eos_token_id])


if __name__ == "__main__":
    run.main_guard(main)
