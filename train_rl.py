"""
Stages 1 to 3 of AVATAR, arXiv:2508.03100: GRPO with stratified replay, temporal advantage shaping
and hints; `--algo grpo` is the plain baseline. Where we differ or the paper is silent: README.

    python train_rl.py --stage 2                                                    # the toy, CPU
    torchrun train_rl.py --stage 2 --model runs/sft/final --data av.jsonl                  # 1 GPU
    torchrun --nproc-per-node 8 train_rl.py --stage 2 --model runs/sft/final --data av.jsonl

A step: draw what to replay (that decides how many fresh completions are needed), roll out, reward,
compare each fresh completion with its group and each replayed one with its prompt's history,
spread the advantages over the tokens, take one gradient step, store the fresh completions.

An Entry (buffer.py) is one completion with its reward; it is fresh if it was born in this step.
"""

import argparse
import copy
import itertools
import time

import run  # before torch: it sets how torch's threads wait

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import buffer
import data
import hints
import metrics
import model
import rewards
import tas
import toy
from grpo import group_advantages, grpo_loss, replay_advantages

WINDOW = 20  # on-policy rewards that R̄(q) is the mean of (authors' script)
KL_SAMPLES = 8  # stored completions that tell whether the policy still moves on a prompt [U7]
EVAL_BATCH, SAMPLE_EVERY = 32, 10  # held-out prompts together; steps between samples.jsonl

STAGES = {  # a typed flag wins
    1: dict(reward_weights="format=.5,acc=.5"),  # paper: general visual reasoning
    2: dict(reward_weights="format=.2,acc=.4,self=.4", audio_captions=True),  # paper: audio-visual
    3: dict(reward_weights="format=.5,judge=.5"),  # paper: format + judge; the weights are [U14]
}
GRPO = dict(num_on=8, num_off=0, tas_shape="uniform", hints=False)  # paper: 8 fresh, nothing else


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **run.PARSER)
    flag, boolean = parser.add_argument, argparse.BooleanOptionalAction
    run.add_flags(parser)
    flag(
        "--stage", type=int, choices=[1, 2, 3], default=2, help="visual, audio-visual, localisation"
    )
    flag("--algo", choices=["avatar", "grpo"], default="avatar", help="grpo: 8 fresh, nothing else")
    # data
    data.add_flags(parser)
    flag(
        "--audio-captions",
        action=boolean,
        default=False,
        help="put audio_caption in the prompt [U16]",
    )
    flag("--eval-data", help="held-out JSONL (default: the toy's, if --data is the toy's)")
    # rollout
    flag("--prompts-per-step", type=int, default=8, help="fresh prompts, over all ranks [U18]")
    flag("--num-on", type=int, default=4, help="fresh completions a prompt (paper)")
    flag("--num-off", type=int, default=4, help="replayed ones a prompt (paper); 0 = no replay")
    flag("--temperature", type=float, default=1.0, help="of sampling and of log-probs (script)")
    flag("--max-new-tokens", type=int, default=2048, help="length of a completion (script)")
    # objective
    flag(
        "--reward-weights", default="format=.5,acc=.5", help="of format, acc, self, judge [R.stage]"
    )
    flag("--judge", choices=["toy"], help="who scores reasoning steps [R.judge] [D5]")
    flag("--clip-eps", type=float, default=0.2, help="clip of the ratio, both sides (script) [J]")
    flag("--kl-coef", type=float, default=0.1, help="beta (paper); 0 = no reference [KL]")
    flag("--off-policy-coef", type=float, default=0.6, help="alpha (paper) [J] [D4]")
    flag("--tas-shape", choices=tas.SHAPES, default="parabolic", help="weight of a token [TAS.w]")
    flag("--tas-lambda", type=float, default=0.3, help="extra weight at the ends (paper) [TAS.w]")
    flag(
        "--tas-equal-mean", action=boolean, default=False, help="rescale weights to mean 1 [TAS.w]"
    )
    # replay and hints
    flag("--buffer-size", type=int, default=10000, help="completions (paper)")
    flag("--hints", action=boolean, default=True, help="for prompts that stay Hard [HINT]")
    flag("--hint-patience", type=int, default=3, help="visits in Hard before a hint [U7]")
    flag("--hint-kl", type=float, default=0.02, help="nats/token: below, the policy is stuck [U7]")
    # optimisation
    flag("--lr", type=float, default=5e-7, help="peak learning rate (script)")
    flag("--warmup-frac", type=float, default=0.05, help="share of steps with rising lr (script)")
    flag("--weight-decay", type=float, default=0.0, help="of AdamW [U18]")
    flag("--max-grad-norm", type=float, default=1.0, help="gradient clipping [U18]")
    flag(
        "--micro-tokens",
        type=int,
        default=16384,
        help="tokens read at one time; less = less memory",
    )
    flag("--lora-rank", type=int, default=16, help="0 = full fine-tuning (paper: 16)")
    flag("--train-towers", action=boolean, default=False, help="vision and audio towers too [D1]")
    flag("--gradient-checkpointing", action=boolean, default=False, help="less memory, more time")
    flag("--eval-every", type=int, default=100, help="steps between evaluations; 0 = none at all")
    flag("--eval-samples", type=int, default=256, help="held-out completions, at --temperature")

    def overrides(first):
        common = dict(out=f"runs/stage{first.stage}", steps=400)  # paper, Fig. 5: 400 iterations
        yield f"stage {first.stage}", common | STAGES[first.stage]
        if first.algo == "grpo":
            yield "grpo", GRPO
        if toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["rl"]
        if first.data is None:
            yield "toy", dict(judge="toy")

    args, source = run.parse(parser, argv, overrides)
    try:
        weights = {
            k: float(v) for k, v in (part.split("=") for part in args.reward_weights.split(","))
        }
    except ValueError:
        raise run.UserError("--reward-weights: write it as format=.5,acc=.5") from None
    if unknown := set(weights) - {"format", "acc", "self", "judge"}:
        raise run.UserError(f"--reward-weights: no part called {', '.join(unknown)}")
    if "judge" in weights and not args.judge:
        raise run.UserError("the judge part of the reward needs --judge")
    run.check_at_least(
        args, num_on=1, num_off=0, prompts_per_step=1, max_new_tokens=1, temperature=1e-3, clip_eps=0,
        kl_coef=0, tas_lambda=0, buffer_size=1, hint_patience=1, hint_kl=1e-9, micro_tokens=1, steps=0,
        lora_rank=0, eval_every=0, eval_samples=1, keep=1,
    )  # fmt: skip
    return args, source, weights


# ---- the update --------------------------------------------------------------------------------


def update(policy, reference, groups, filler, step, args):
    """
    Adds the step's gradient over micro-batches; a prompt is read once for all its completions.

    groups   list of (Prompt, list of (Entry, advantage, weight in J))
    filler   (Prompt, list of one such item of weight 0): what a rank reads that has less to do
    returns  dict of (N,) tensors, a number a completion, for metrics.py
    """
    pieces = []  # a group larger than --micro-tokens is read in parts
    for prompt, items in groups:
        room = args.micro_tokens - len(prompt.input_ids)
        for pack in run.micro_batches([len(e.completion_ids) for e, _, _ in items], room):
            pieces.append((prompt, [items[i] for i in pack]))
    sizes = [len(p.input_ids) + sum(len(e.completion_ids) for e, _, _ in i) for p, i in pieces]
    packs = [[pieces[i] for i in pack] for pack in run.micro_batches(sizes, args.micro_tokens)]
    infos = []
    for k in range(max(run.gather(len(packs)))):  # the same on every rank, or FSDP would hang
        part = packs[k] if k < len(packs) else [filler]
        prompts = [prompt for prompt, _ in part]
        completions = [[e.completion_ids.long() for e, _, _ in items] for _, items in part]
        entries, advantages, weights = zip(*(item for _, items in part for item in items))
        inputs = (prompts, completions, args.temperature)

        logprobs, mask, entropy = model.completion_logprobs(policy, *inputs)
        # of the policy that sampled the completion: this one if fresh, an earlier one if replayed
        old_logprobs = pad_sequence([e.old_logprobs for e in entries], True).to(logprobs)
        ref_logprobs = None
        if args.kl_coef:
            with torch.no_grad(), policy.reference():
                ref_logprobs, _, _ = model.completion_logprobs(reference or policy, *inputs)
        shape = (mask, args.tas_shape, args.tas_lambda, args.tas_equal_mean)
        token_advantages = tas.shape_advantages(torch.tensor(advantages).to(logprobs), *shape)
        loss, info = grpo_loss(
            logprobs, old_logprobs, ref_logprobs, token_advantages, mask,
            torch.tensor(weights).to(logprobs), args.clip_eps, args.kl_coef,
        )  # fmt: skip
        # the weights already sum to 1 over all ranks, and FSDP takes the mean over ranks
        (loss * run.world_size()).backward()
        if k < len(packs):
            lengths = mask.sum(1)
            info["entropy"] = (entropy * mask).sum(1) / lengths
            info["tas_weight"] = tas.tas_weights(*shape).sum(1) / lengths
            info["fresh"] = torch.tensor([e.born_step == step for e in entries])
            infos.append({name: value.cpu() for name, value in info.items()})
    infos = [info for part in run.gather(infos) for info in part]
    return {name: torch.cat([info[name] for info in infos]) for name in infos[0]}


def stored_kls(policy, stored, idle, temperature):
    """
    How far the policy has moved from the ones that sampled the stored completions.  [HINT.KL]

    stored   {prompt_id: (Prompt, list of Entry)}, this rank's
    idle     callable() -> such a pair, for a rank that only keeps the others company
    returns  {prompt_id: nats per token}, of all ranks
    """
    kls, todo = {}, list(stored.items())
    for k in range(max(run.gather(len(todo)))):  # the same on every rank, or FSDP would hang
        prompt_id, (prompt, entries) = todo[k] if k < len(todo) else (None, idle())
        completions = [e.completion_ids.long() for e in entries]
        with torch.no_grad():
            inputs = ([prompt], [completions], temperature)
            logprobs, mask, _ = model.completion_logprobs(policy, *inputs)
        old_logprobs = pad_sequence([e.old_logprobs for e in entries], True).to(logprobs)
        kls[prompt_id] = hints.behavior_kl(logprobs, old_logprobs, mask)
    kls.pop(None, None)
    return {q: kl for part in run.gather(kls) for q, kl in part.items()}


def held_out_accuracy(policy, load, rows, reader, build, args):
    """Share of right answers among --eval-samples completions, sampled as in training."""
    count = min(len(rows), args.eval_samples)
    per_row, right = max(1, round(args.eval_samples / count)), []
    # as many on every rank, or FSDP would hang: the surplus repeats the last row, and is not scored
    mine = range(run.rank(), -(-count // run.world_size()) * run.world_size(), run.world_size())
    for first in range(0, len(mine), EVAL_BATCH):
        places = mine[first : first + EVAL_BATCH]
        batch = [rows[min(i, count - 1)] for i in places]
        groups = model.rollout(
            policy, [load(row, None, reader) for row in batch], [per_row] * len(batch), args.temperature,
            args.max_new_tokens, build.eos_ids, seeds=[run.seed(args.seed, 0, i) for i in places],
        )  # fmt: skip
        for i, row, group in zip(places, batch, groups):
            truth = (row["answer"], row["answer_type"], row.get("options"))
            for text in build.texts(group) if i < count else ():
                right.append(rewards.accuracy_reward(rewards.parse_answer(text), *truth) == 1)
    right = [r for part in run.gather(right) for r in part]
    return sum(right) / len(right)


# ---- the run -----------------------------------------------------------------------------------


def main():
    args, source, reward_weights = parse_args()
    device = run.init_processes(args.device)
    out = run.open_folder(args, source)
    run.check_multiple("--prompts-per-step", args.prompts_per_step)
    toy_model, toy_train, toy_test = toy.defaults(args, args.stage)

    # ---- data
    rows = data.Rows(args.data or toy_train)
    held_out = args.eval_data or (toy_test if args.data is None else None)
    held_out = data.Rows(held_out) if held_out and args.eval_every else None
    folder = model.start_folder(args.model or toy_model, args.lora_rank, out)
    recipe, cache = data.recipe_from(args), int(args.cache_gb * 1e9)
    build = model.InputBuilder(folder, recipe, rows.path.parent, args.audio_captions)
    reader = data.Reader(build, args.workers, cache)
    held_out_reader = held_out and data.Reader(build.at(held_out.path.parent), args.workers, cache)
    judge = toy.judge if args.judge == "toy" else None
    nothing = buffer.Entry("", torch.tensor(build.eos_ids[:1]), torch.zeros(1), 0.0, {}, 0, False)

    # ---- policy, and the reference it stays close to
    policy = model.load(folder, args.lora_rank, args.train_towers, args.gradient_checkpointing)
    reference = None
    if args.kl_coef and not args.lora_rank:  # with LoRA: the policy without its adapter [U15]
        reference = run.place(copy.deepcopy(policy).requires_grad_(False), device, args.dtype)
    policy = run.place(policy, device, args.dtype)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)

    # ---- what a checkpoint holds beside the weights
    replay = buffer.ReplayBuffer(args.buffer_size, WINDOW)
    schedule = hints.HintSchedule(args.hint_patience, args.hint_kl)
    refused, start, num_generated = set(), 0, 0
    if args.resume and (state := run.load_checkpoint(out, policy, optimizer)):
        start, num_generated = state["step"], state["num_generated"]
        replay.load_state_dict(state["buffer"])
        schedule.load_state_dict(state["hints"])
    run.begin(out, args, start)
    steps = args.steps or -(-len(rows) // args.prompts_per_step)
    run.print0(f"  {len(rows)} rows, {steps} steps of {args.prompts_per_step}, from step {start}")

    def load(row, hint=None, reader=reader):
        """A prompt's inputs; when the towers are frozen their outputs, which never change."""
        prompt = reader.get(row, hint)
        if not args.train_towers and not prompt.encoded:
            with torch.no_grad():
                media = policy.encode([prompt])[0]
            prompt = prompt._replace(media={name: value.cpu() for name, value in media.items()})
            reader.put(row, hint, prompt)
        return prompt

    def hint_of(row):
        """The row's hint, unless it gives the answer away: then it is refused, and that is told."""
        q, hint = row["prompt_id"], row.get("hint") if args.hints else None
        if hint and q not in refused:
            truth = (row["answer"], row["answer_type"], row.get("options"))
            if reason := hints.hint_leak(hint, *truth):
                refused.add(q)
                run.print0(f"hint refused: {q}: {reason}")
        return None if q in refused else hint

    def evaluate():
        reader = held_out_reader
        return held_out and held_out_accuracy(policy, load, held_out, reader, build, args)

    # ---- loop
    before = accuracy = evaluate() if start == 0 else None
    if before is not None:
        run.print0(f"held-out accuracy before training: {before:.3f}")
    order = data.shuffled(len(rows), args.seed, skip=start * args.prompts_per_step)
    mine = run.share(args.prompts_per_step)  # this rank's slice of every step's prompts
    next_rows = [rows[i] for i in itertools.islice(order, args.prompts_per_step)]
    bar = run.progress(start, steps, f"stage {args.stage} {args.algo}")
    for step in range(start + 1, steps + 1):
        began = time.perf_counter()
        step_rows = next_rows
        ids = [row["prompt_id"] for row in step_rows]

        # ---- what to replay [SPLIT]: the same on every rank, as they hold the same buffer
        rng = np.random.default_rng([args.seed, step])
        drawn = replay.draw(args.prompts_per_step, args.num_off, step, rng) if args.num_off else []
        drawn += [[]] * (args.prompts_per_step - len(drawn))  # little stored: more fresh ones [U6]
        for group in filter(None, drawn[mine]):
            row = rows[rows.index(group[0].prompt_id)]
            reader.prefetch(row, row.get("hint") if group[0].hinted else None)

        # ---- who gets a hint                                                           [HINT]
        events, stored = [], {}
        if args.hints:
            for row in step_rows[mine]:
                q = row["prompt_id"]
                entries = [e for e in replay.entries_of(q, step) if not e.hinted][-KL_SAMPLES:]
                if entries and hint_of(row) and schedule.needs_kl(q, replay.tier(q)):
                    stored[q] = (load(row), entries)
            idle = lambda: (load(step_rows[mine][0]), [nothing])  # noqa: B023, E731
            kls = stored_kls(policy, stored, idle, args.temperature)
            for q in dict.fromkeys(ids):  # once, also if the end of an epoch brings a prompt twice
                events.append((schedule.observe(q, replay.tier(q), kls.get(q)), q))
        due = [row for row in step_rows if schedule.due(row["prompt_id"])]
        hint = {row["prompt_id"]: text for row in due if (text := hint_of(row))}

        # ---- roll out
        prompts = [load(row, hint.get(row["prompt_id"])) for row in step_rows[mine]]
        data_s = time.perf_counter() - began
        num_fresh = [args.num_on + args.num_off - len(group) for group in drawn]
        seeds = [run.seed(args.seed, step, i) for i in range(args.prompts_per_step)]
        rolled = model.rollout(
            policy, prompts, num_fresh[mine], args.temperature, args.max_new_tokens,
            build.eos_ids, seeds[mine],
        )  # fmt: skip
        next_rows = [rows[i] for i in itertools.islice(order, args.prompts_per_step)]
        for row in next_rows[mine]:
            reader.prefetch(row)
        rollout_s = time.perf_counter() - began - data_s

        # ---- reward; then every rank knows what every rank made
        made = []
        for row, group in zip(step_rows[mine], rolled):
            q, means = row["prompt_id"], [c.logprobs.mean().item() for c in group]
            scored = rewards.reward_completions(
                row, build.texts(group), means, reward_weights, judge
            )
            # what could not be judged has no reward: it leaves the group and is not counted as 0
            made.append([
                buffer.Entry(q, c.ids, c.logprobs, reward, parts, step, q in hint)
                for c, (reward, parts) in zip(group, scored)
                if reward is not None
            ])  # fmt: skip
        made = [group for part in run.gather(made) for group in part]
        num_on, num_off = sum(map(len, made)), sum(map(len, drawn))
        if not num_on:
            raise run.UserError(
                f"step {step}: no completion could be judged: is the judge running?"
            )

        # ---- advantages: fresh against its group, replayed against its prompt's history
        fresh_advantages = [group_advantages(torch.tensor([e.reward for e in g])) for g in made]
        replayed = [e for group in drawn for e in group]
        off_advantages = replay_advantages(
            torch.tensor([e.reward for e in replayed]),
            torch.tensor([replay.mean_reward(e.prompt_id) for e in replayed]),
        ).split([len(group) for group in drawn])
        groups = {}  # (prompt, hinted) -> its completions on this rank: one prompt, read once
        for i in range(mine.start, mine.stop):
            for e, advantage in zip(made[i], fresh_advantages[i].tolist()):
                item = (e, advantage, 1 / num_on)  # [J.on]
                groups.setdefault((e.prompt_id, e.hinted), []).append(item)
            for e, advantage in zip(drawn[i], off_advantages[i].tolist()):
                item = (e, advantage, args.off_policy_coef / num_off)  # [J.off]
                groups.setdefault((e.prompt_id, e.hinted), []).append(item)

        # ---- update
        began_update = time.perf_counter()
        by_prompt = []
        for (q, hinted), items in groups.items():
            row = rows[rows.index(q)]
            by_prompt.append((load(row, row.get("hint") if hinted else None), items))
        filler = (prompts[0], [(nothing, 0.0, 0.0)])
        info = update(policy, reference, by_prompt, filler, step, args)
        grad_norm = run.clip_grad_norm(policy, args.max_grad_norm, f"step {step}, prompts {ids}")
        run.set_lr(optimizer, args.lr, step, steps, args.warmup_frac, cosine=False)
        optimizer.step()
        optimizer.zero_grad()
        update_s = time.perf_counter() - began_update

        # ---- remember
        for group in filter(None, made):
            if not group[0].hinted:  # R̄(q) is what the policy earns by itself     [R.mean] [U8]
                replay.observe(group[0].prompt_id, [e.reward for e in group])
            if args.num_off:
                replay.add(group)
        num_generated += sum(num_fresh)

        # ---- report
        step_s = time.perf_counter() - began
        evaluated = args.eval_every and (step % args.eval_every == 0 or step == steps)
        accuracy = evaluate() if evaluated else accuracy
        report = dict(step=step, completions_generated=num_generated)
        report |= metrics.step_metrics(info, made, fresh_advantages, off_advantages, build.eos_ids)
        report |= replay.stats(step) | {
            "rewards/unjudged_frac": 1 - num_on / sum(num_fresh),
            "hints/frac": sum(q in hint for q in ids) / len(ids),
            "hints/entered": schedule.entered,
            "hints/withdrawn": schedule.withdrawn,
            "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_s": report["num_valid_tokens"] / step_s,
            "time/data_s": data_s,
            "time/rollout_s": rollout_s,
            "time/update_s": update_s,
        }
        if evaluated and accuracy is not None:
            report["eval/acc"] = accuracy
        run.log(out / "metrics.jsonl", report)
        if step % SAMPLE_EVERY == 1:
            for sample in metrics.samples(
                step, made[0], fresh_advantages[0], replay, build.tokenizer
            ):
                run.log(out / "samples.jsonl", sample)
        for event, q in events:
            if event:
                bar.write(f"step {step:4d}/{steps}  hint {event}: {q}")
        bar.write(metrics.step_line(report, steps))
        bar.update()
        if args.save_every and step % args.save_every == 0:
            state = dict(num_generated=num_generated, buffer=replay.state_dict())
            state["hints"] = schedule.state_dict()
            run.save_checkpoint(out, step, policy, optimizer, state, args.keep)
    bar.close()
    model.save(policy, out / "final", build.processor)
    if before is not None:
        after = f"{accuracy:.3f} after {num_generated} completions"
        run.print0(f"held-out accuracy: {before:.3f} before, {after}")
    run.print0(f"saved {out / 'final'}")


if __name__ == "__main__":
    run.main_guard(main)
