"""
Stage 0, cold-start SFT: teaches the format and the habit of reasoning before RL, on rows with a
`reasoning`. The loss is the mean over the completion tokens of a step. The towers train along by
default: in the RL stages they are frozen.

    python train_sft.py                                                             # the toy, CPU
    torchrun train_sft.py --model Qwen/Qwen2.5-Omni-7B --data cot.jsonl --out runs/sft     # 1 GPU
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-Omni-7B --data cot.jsonl
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse

import toy
from data.media_flags import add_media_flags, check_media_flags, media_config_from
from run import arguments
from run.packing import pack_sizes


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    boolean = argparse.BooleanOptionalAction
    # fmt: off

    flag = arguments.add_flags(parser)
    flag("--lora-rank", type=int, default=16, help="rank of the adapter (paper: 16); 0 = train all weights of the text model")
    flag("--lora-experts", action=boolean, default=False, help="adapter on the experts too, not on attention alone (Qwen3-Omni)")
    flag("--train-towers", action=boolean, default=True, help="train the vision and audio towers too")
    add_media_flags(parser)

    flag = parser.add_argument_group("optimisation").add_argument
    flag("--batch-size", type=int, default=64, help="rows per step, over all ranks [U18]")
    flag("--lr", type=float, default=1e-5, help="peak learning rate, then a cosine down to a tenth of it [U18]")
    flag("--micro-tokens", type=int, default=8192, help="tokens per forward pass; lower it to save memory")

    # fmt: on

    def overrides(first):
        yield "stage 0", dict(out="runs/sft", steps=0)  # one epoch
        if toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["sft"]

    args, source = arguments.parse(parser, argv, overrides)
    check_media_flags(args)
    arguments.check_bounds(args, **arguments.BOUNDS, batch_size=1)
    return args, source


if __name__ == "__main__":
    arguments.answer_early(parse_args)  # --help and mistakes answer before torch is loaded

import functools

import torch
import torch.distributed as dist

from data.clip_cache import ClipCache
from data.clips import BadRow
from data.row_stream import RowStream
from data.rows import Rows, completion_text
from models.inputs import InputBuilder
from models.loading import open_policies
from models.paths import resolve_start_model, save_model
from models.policy import completion_logprobs
from run import checkpoint, devices, logs, optim, processes
from run.errors import out_of_memory_advice
from run.launch import run_main
from run.run_dir import open_run_dir
from run.signals import save_and_maybe_stop, watch_signals
from training import guards, metrics
from training.page import RunPage


def encode_completion(builder, row):
    """The reasoning and the answer as tokens (T,), with the end token that a rollout stops at."""
    # a Thinking model's template writes <think> into the prompt
    text = completion_text(row).removeprefix(builder.opened_tag)
    return torch.tensor([*builder.tokenizer(text).input_ids, builder.tokenizer.eos_token_id])


@out_of_memory_advice("the update: lower --micro-tokens, also with --resume")
def add_gradient(policy, prompts, completions, micro_tokens):
    """
    loss = - sum_t log pi(c_t | q, c_<t) / N,  N completion tokens of the whole step
    Adds its gradient to the policy's parameters.

    prompts      list of Prompt, this rank's
    completions  list of (T,) int64, one per prompt
    returns      loss, N, both over all ranks
    """
    num_local_tokens = sum(len(completion) for completion in completions)
    # of all ranks: neither the split into micro-batches nor the number of ranks changes the gradient
    num_tokens = sum(processes.all_gather_object(num_local_tokens))
    sizes = [len(p.input_ids) + len(c) for p, c in zip(prompts, completions)]
    packs = pack_sizes(sizes, micro_tokens)

    loss_sum = torch.zeros((), device=policy.device)
    for pack, is_real in processes.even_rounds(packs, packs[-1]):
        logprobs, _, _ = completion_logprobs(  # (N, T), 0 off the mask
            policy,
            [prompts[i] for i in pack],
            [[completions[i]] for i in pack],
            temperature=1.0,
        )
        # a repeated pack counts 0: it is there because all ranks must make as many forward passes
        weight = 1.0 if is_real else 0.0
        loss = -weight * logprobs.sum() / num_tokens
        (loss * processes.world_size()).backward()  # FSDP takes the mean over ranks
        loss_sum += loss.detach()
    if processes.world_size() > 1:
        dist.all_reduce(loss_sum)
    return loss_sum.item(), num_tokens


# ---- the run -----------------------------------------------------------------------------------


def main():
    args, source = parse_args()
    device = processes.init(args.device)
    devices.check_fallback(args.device, device, processes.world_size(), toy.is_toy(args.model))
    out = open_run_dir(
        args.out,
        arguments=vars(args),
        source=source,
        resume=args.resume,
        trackers=args.log,
    )
    processes.check_dtype(device, args.dtype, args.lora_rank)
    processes.check_multiple("--batch-size", args.batch_size)
    toy_model, toy_train, _ = toy.write_defaults(0, args.model, args.data)

    # ---- rows and the policy
    rows = Rows(args.data or toy_train)
    folder = resolve_start_model(args.model or toy_model, args.lora_rank)
    media_config = media_config_from(args)
    builder = InputBuilder(folder, media_config, rows.path.parent, audio_captions=False)
    policy, _ = open_policies(
        folder,
        device=device,
        dtype=args.dtype,
        attn=args.attn,
        lora_rank=args.lora_rank,
        lora_experts=args.lora_experts,
        train_towers=args.train_towers,
        with_reference=False,
    )
    optimizer = optim.adamw(policy, args.lr)
    encoder = None if args.train_towers else policy  # frozen towers encode each clip once
    row_stream = RowStream(
        rows,
        ClipCache(builder, int(args.cache_gb * 1e9), encoder),
        rows_per_step=args.batch_size,
        seed=args.seed,
        required_field="reasoning",
        with_hints=True,
    )

    # ---- what a checkpoint holds beside the weights
    guard = guards.StepGuard(max_seq_ratio=0)
    start_step = 0
    if args.resume:
        state = checkpoint.load(out, policy, optimizer)
        if state:
            start_step = state["step"]
            checkpoint.restore(state, row_stream=row_stream, guard=guard)

    def state_without_weights():
        """Taken before each step: if the step must not count, this is saved."""
        return checkpoint.states(row_stream=row_stream, guard=guard)

    def save(step, state):
        checkpoint.save(
            out,
            step,
            policy=policy,
            optimizer=optimizer,
            state=state,
            keep_checkpoints=args.keep_checkpoints,
        )

    num_steps = args.steps or -(-len(rows) // args.batch_size)  # 0: one epoch, the last step full
    log = logs.RunLog(
        out,
        arguments=vars(args),
        step=start_step,
        num_steps=num_steps,
        trackers=args.log,
    )
    RunPage(out)  # written at the end of the run
    processes.print0(
        f"  {len(rows)} rows, {num_steps} steps of {args.batch_size}, from step {start_step}"
    )
    local = processes.local_slice(args.batch_size)
    row_stream.prefetch_next()
    watch_signals()
    steps = processes.Steps(start_step, num_steps, "stage 0")
    for step in steps:
        clock = metrics.Clock()
        save_before = functools.partial(save, step - 1, state_without_weights())

        # ---- the rows of the step
        step_rows, prompts = row_stream.next_rows(steps)
        completions = [encode_completion(builder, row) for row in step_rows[local]]
        row_stream.prefetch_next()
        clock.lap("data")

        # ---- the gradient, and the optimizer step unless its numbers are bad
        loss, num_valid_tokens = add_gradient(policy, prompts, completions, args.micro_tokens)
        grad_norm = optim.clip_grad_norm(policy)
        problem = guard.find_problem(loss, grad_norm)
        prompt_ids = {row["prompt_id"] for row in step_rows}
        if guard.stop_or_skip(problem, prompt_ids, steps, args.on_bad_step, save_before):
            optimizer.zero_grad()
        else:
            optim.step(optimizer, args.lr, step, num_steps, cosine=True)

        # ---- report, and save when it is time to
        step_s = clock.total()
        report = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"],
            **guard.report(),
            "data/bad_rows": len(row_stream.bad_rows),
            "tokens_per_s": num_valid_tokens / step_s,
            "time/data_s": clock.seconds["data"],
            "time/step_s": step_s,
        }
        log.write(report)
        steps.tell(f"loss {loss:.4f}  grad {grad_norm:.2f}  {step_s:.2f} s")
        save_now = functools.partial(save, step, state_without_weights())
        save_and_maybe_stop(step, num_steps, args.save_every, save_now)

    # ---- the end
    save_model(policy, out / "final", builder.processor)
    processes.print0(f"saved {out / 'final'}")


if __name__ == "__main__":
    run_main(main, BadRow)
