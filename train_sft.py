"""
Stage 0, cold-start SFT: teach the format and the habit of reasoning before RL, on rows with a
`reasoning`. The loss is on completion tokens only; every token of the step weighs the same. The towers
train along by default: this is the stage in which the model may still learn to see.

    python train_sft.py                                                             # the toy, CPU
    torchrun train_sft.py --model Qwen/Qwen2.5-Omni-7B --data cot.jsonl --out runs/sft     # 1 GPU
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-Omni-7B --data cot.jsonl
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse

import toy
from data.media_flags import add_media_flags, media_config_from
from run import arguments


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    boolean = argparse.BooleanOptionalAction
    flag = arguments.add_flags(parser)
    flag("--lora-rank", type=int, default=16, help="0 = full fine-tuning (paper: 16)")
    flag("--train-towers", action=boolean, default=True, help="train vision and audio towers too")
    add_media_flags(parser)
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--batch-size", type=int, default=64, help="rows a step, over all ranks [U18]")
    flag("--lr", type=float, default=1e-5, help="peak learning rate, then a cosine [U18]")
    flag("--micro-tokens", type=int, default=8192, help="tokens read at once; less = less memory")

    def overrides(first):
        yield "stage 0", dict(out="runs/sft", steps=0)
        if toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["sft"]

    args, source = arguments.parse(parser, argv, overrides)
    arguments.check_bounds(args, **arguments.BOUNDS, batch_size=1)
    return args, source


if __name__ == "__main__":
    arguments.answer_early(parse_args)

import functools

import torch
import torch.distributed as dist

from data.clip_cache import ClipCache
from data.clips import BadRow
from data.row_stream import RowStream
from data.rows import Rows, completion_text
from models.inputs import InputBuilder
from models.loading import open_policies, write_merged
from models.paths import resolve_start_model, save_model
from models.policy import completion_logprobs
from rl import guards, metrics
from rl.page import RunPage
from run import checkpoint, logs, optim, processes
from run.launch import run_main
from run.run_dir import open_run_dir
from run.signals import save_and_maybe_stop, watch_signals


def gradient(policy, prompts, completions, micro_tokens):
    """
    Adds the gradient of the mean negative log-likelihood over the completion tokens of the step.

    prompts      list of Prompt, this rank's
    completions  list of (T,) int64, one a prompt
    returns      loss (), num_valid_tokens, both of all ranks
    """
    sizes = [len(p.input_ids) + len(c) for p, c in zip(prompts, completions)]
    packs = optim.micro_batches(sizes, micro_tokens)
    # of the whole step on all ranks, so that no split of it changes the gradient
    num_valid_tokens = sum(processes.all_gather_object(sum(map(len, completions))))
    loss_sum = torch.zeros((), device=policy.device)
    for pack, counts in processes.even_rounds(packs, packs[-1]):
        taken = [prompts[i] for i in pack], [[completions[i]] for i in pack]
        logprobs, _, _ = completion_logprobs(policy, *taken, temperature=1.0)
        loss = -float(counts) * logprobs.sum() / num_valid_tokens
        (loss * processes.world_size()).backward()  # FSDP takes the mean over ranks
        loss_sum += loss.detach()
    if processes.world_size() > 1:
        dist.all_reduce(loss_sum)
    return loss_sum.item(), num_valid_tokens


def main():
    args, source = parse_args()
    device = processes.init(args.device)
    out = open_run_dir(
        args.out,
        arguments=vars(args),
        source=source,
        resume=args.resume,
        trackers=args.log,
    )
    processes.check_dtype(device, args.dtype)
    processes.check_multiple("--batch-size", args.batch_size)
    toy_model, toy_train, _ = toy.write_defaults(0, args.model, args.data)

    rows = Rows(args.data or toy_train)
    folder = resolve_start_model(args.model or toy_model, args.lora_rank, out, write_merged)
    build = InputBuilder(folder, media_config_from(args), rows.path.parent, False)
    policy, _ = open_policies(
        folder,
        device=device,
        dtype=args.dtype,
        attn=args.attn,
        lora_rank=args.lora_rank,
        train_towers=args.train_towers,
        with_reference=False,
    )
    optimizer = optim.adamw(policy, args.lr)
    clip_cache = ClipCache(build, int(args.cache_gb * 1e9))
    stream = RowStream(
        rows,
        clip_cache,
        rows_per_step=args.batch_size,
        seed=args.seed,
        required_field="reasoning",
        with_hints=True,
    )
    watch, start = guards.StepGuard(max_ratio=0), 0
    if args.resume and (found := checkpoint.load(out, policy, optimizer)):
        start = found["step"]
        checkpoint.restore(found, health=watch, rows=stream)
    count = args.steps or -(-len(rows) // args.batch_size)
    processes.print0(f"  {len(rows)} rows, {count} steps of {args.batch_size}, from step {start}")

    def save(step, state):
        checkpoint.save(
            out,
            step,
            policy=policy,
            optimizer=optimizer,
            state=state,
            keep_checkpoints=args.keep_checkpoints,
        )

    stream.prefetch_next()
    log = logs.RunLog(out, arguments=vars(args), step=start, num_steps=count, trackers=args.log)
    RunPage(out)  # written at the end of the run
    watch_signals()
    steps = processes.Steps(start, count, "stage 0")
    for step in steps:
        clock, before_step = metrics.Clock(), checkpoint.states(health=watch, rows=stream)
        step_rows, prompts = stream.next_rows(steps)
        local_rows = step_rows[processes.local_slice(args.batch_size)]
        completions = [encode_completion(build.tokenizer, row) for row in local_rows]
        stream.prefetch_next()
        clock.lap("data")

        loss, num_valid_tokens = gradient(policy, prompts, completions, args.micro_tokens)
        grad_norm = optim.clip_grad_norm(policy)
        problem, ids = watch.bad_step(loss, grad_norm), {row["prompt_id"] for row in step_rows}
        save_before = functools.partial(save, step - 1, before_step)
        if watch.refuses(problem, ids, steps, args.on_bad_step, save_before):
            optimizer.zero_grad()
        else:
            optim.step(optimizer, args.lr, step, count, cosine=True)

        step_s, lr = clock.total(), optimizer.param_groups[0]["lr"]
        report = dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr) | watch.report()
        report |= {
            "data/bad_rows": len(stream.bad_rows),
            "tokens_per_s": num_valid_tokens / step_s,
            "time/data_s": clock.seconds["data"],
            "time/step_s": step_s,
        }
        log.write(report)
        steps.tell(f"loss {loss:.4f}  grad {grad_norm:.2f}  {step_s:.2f} s")
        small_state = functools.partial(checkpoint.states, health=watch, rows=stream)
        save_and_maybe_stop(step, count, args.save_every, lambda: save(step, small_state()))
    save_model(policy, out / "final", build.processor)
    processes.print0(f"saved {out / 'final'}")


def encode_completion(tokenizer, row):
    """The reasoning and the answer as tokens, with the end token that a rollout stops at."""
    return torch.tensor([*tokenizer(completion_text(row)).input_ids, tokenizer.eos_token_id])


if __name__ == "__main__":
    run_main(main, BadRow)
