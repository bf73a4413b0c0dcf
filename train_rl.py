"""
Stages 1 to 3 of AVATAR, arXiv:2508.03100: GRPO with stratified replay, temporal advantage shaping
and hints; `--algo grpo` is the plain baseline. Where we differ or the paper is silent: README.

    python train_rl.py --stage 2                                                    # the toy, CPU
    torchrun train_rl.py --stage 2 --model runs/sft/final --data av.jsonl                  # 1 GPU
    torchrun --nproc-per-node 8 train_rl.py --stage 2 --model runs/sft/final --data av.jsonl

A step: draw what to replay (that decides how many fresh completions are needed), roll out, reward,
compare each fresh completion with its group and each replayed one with its prompt's history,
spread the advantages over the tokens, take a gradient step, store the fresh completions.

An Entry (buffer.py) is one completion with its reward; it is fresh if it was born in this step.
"""

import argparse
import functools
import time

import run  # before torch: it sets how torch's threads wait

import numpy as np
import torch

import buffer
import checkpoint
import data
import held_out
import hints
import judge
import metrics
import model
import optim
import rewards
import stream
import tas
import toy
import update
from grpo import group_advantages, grpo_loss, replay_advantages  # noqa: F401  offered from here

WINDOW = 20  # on-policy rewards that R̄(q) is the mean of (authors' script)
KL_SAMPLES = 8  # stored completions that tell whether the policy still moves on a prompt [U7]
SAMPLE_EVERY = 10  # steps between samples.jsonl

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
    flag("--stage", type=int, choices=[1, 2, 3], default=2, help="visual, audio-visual, places")
    flag("--algo", choices=["avatar", "grpo"], default="avatar", help="grpo: 8 fresh, nothing else")
    # data
    data.add_flags(parser)
    flag("--feature-dir", help="also keep on disk, here, what the frozen towers made of a clip")
    flag("--audio-captions", action=boolean, default=False, help="captions in prompts [U16]")
    flag("--eval-data", help="held-out JSONL (default: the toy's, if --data is the toy's)")
    # rollout
    flag("--prompts-per-step", type=int, default=8, help="fresh prompts, over all ranks [U18]")
    flag("--num-on", type=int, default=4, help="fresh completions a prompt (paper)")
    flag("--num-off", type=int, default=4, help="replayed ones a prompt (paper); 0 = no replay")
    flag("--temperature", type=float, default=1.0, help="of sampling and of log-probs (script)")
    flag("--max-new-tokens", type=int, default=2048, help="length of a completion (script)")
    flag("--rollout-parts", type=int, default=1, help="rollouts a step: a judge begins earlier")
    # objective
    flag("--reward-weights", default="format=.5,acc=.5", help="format, acc, self, judge [R.stage]")
    judge.add_flags(parser)
    flag("--clip-eps", type=float, default=0.2, help="clip of the ratio, both sides (script) [J]")
    flag("--kl-ratio", action=boolean, default=False, help="each token's KL times r [U20]")
    flag("--kl-coef", type=float, default=0.1, help="beta (paper); 0 = no reference [KL]")
    flag("--off-policy-coef", type=float, default=0.6, help="alpha (paper) [J] [D4]")
    flag("--tas-shape", choices=tas.SHAPES, default="parabolic", help="weight of a token [TAS.w]")
    flag("--tas-lambda", type=float, default=0.3, help="extra weight at the ends (paper) [TAS.w]")
    flag("--tas-equal-mean", action=boolean, default=False, help="weights of mean 1 [TAS.w]")
    # replay and hints
    flag("--buffer-size", type=int, default=10000, help="completions (paper)")
    flag("--max-staleness", type=int, default=0, help="steps; older ones rest; 0: no limit [U21]")
    choices = ["keep", "replace"]
    flag("--flat-groups", choices=choices, default="keep", help="fresh, of equal rewards [U22]")
    flag("--hints", action=boolean, default=True, help="for prompts that stay Hard [HINT]")
    flag("--hint-patience", type=int, default=3, help="visits in Hard before a hint [U7]")
    flag("--hint-kl", type=float, default=0.02, help="nats/token: below, the policy is stuck [U7]")
    # optimisation
    flag("--lr", type=float, default=5e-7, help="peak learning rate (script)")
    flag("--cosine", action=boolean, default=False, help="lr falls to a tenth [U18]")
    flag("--updates-per-rollout", type=int, default=1, help="gradient steps a step [U19]")
    flag("--warmup-frac", type=float, default=0.05, help="share of steps with rising lr (script)")
    flag("--weight-decay", type=float, default=0.0, help="of AdamW [U18]")
    flag("--max-grad-norm", type=float, default=1.0, help="gradient clipping [U18]")
    flag("--micro-tokens", type=int, default=16384, help="tokens read at once; less = less memory")
    flag("--lora-rank", type=int, default=16, help="0 = full fine-tuning (paper: 16)")
    flag("--train-towers", action=boolean, default=False, help="vision and audio towers too [D1]")
    flag("--gradient-checkpointing", action=boolean, default=True, help="less memory, more time")
    flag("--max-ratio", type=float, default=10.0, help="of a completion: above it, a bad step")
    flag("--min-entropy", type=float, default=1e-4, help="nats; below it for 10 steps: collapsed")
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
        weights = rewards.parse_weights(args.reward_weights)
    except ValueError as problem:
        raise run.UserError(f"--reward-weights: {problem}: write it as format=.5,acc=.5") from None
    if "judge" in weights and not args.judge:
        raise run.UserError("the judge part of the reward needs --judge: a URL or a folder")
    if args.feature_dir and args.train_towers:
        raise run.UserError("--feature-dir is for frozen towers: leave out --train-towers")
    run.check_bounds(
        args, **run.BOUNDS, **judge.BOUNDS, num_off=0, num_on=1 if args.num_off else 2, prompts_per_step=1,
        buffer_size=max(1, -(-5 * args.num_off // 2)),  # Hard's 40 % have to hold what is drawn at once
        max_new_tokens=1, temperature=1e-3, clip_eps=0, kl_coef=0, tas_lambda=0, hint_patience=1, hint_kl=1e-9,
        eval_every=0, eval_samples=1, rollout_parts=1, updates_per_rollout=1, max_staleness=0, max_ratio=0,
        off_policy_coef=0, min_entropy=0,
    )  # fmt: skip
    return args, source, weights


# ---- the run -----------------------------------------------------------------------------------


def main():
    args, source, reward_weights = parse_args()
    device = run.init_processes(args.device)
    out = run.open_folder(args, source)
    run.check_multiple("--prompts-per-step", args.prompts_per_step)
    toy_model, toy_train, toy_test = toy.defaults(args, args.stage)

    # ---- data
    rows = data.Rows(args.data or toy_train)
    held_out_rows = args.eval_data or (toy_test if args.data is None else None)
    held_out_rows = data.Rows(held_out_rows) if held_out_rows and args.eval_every else None
    folder = model.start_folder(args.model or toy_model, args.lora_rank, out)
    recipe, readers = data.recipe_from(args), 2 if held_out_rows else 1
    build = model.InputBuilder(folder, recipe, rows.path.parent, args.audio_captions)
    given = (args, rows.path.parent, recipe, out, device)
    judged = judge.open_judge(*given) if "judge" in reward_weights else None
    nothing = buffer.Entry("", build.filler.input_ids, torch.zeros(1), 0.0, {}, 0, False)
    filler = (build.filler, [nothing])

    # ---- policy, and the reference it stays close to
    reference = None
    if args.kl_coef and not args.lora_rank:  # with LoRA: the policy without its adapter [U15]
        reference = model.load(folder, 0, args.train_towers, False).requires_grad_(False)
        reference = run.place(reference, device, args.dtype)
    policy = model.load(folder, args.lora_rank, args.train_towers, args.gradient_checkpointing)
    policy = run.place(policy, device, args.dtype)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    store = args.feature_dir and stream.FeatureFolder(args.feature_dir, build, policy.towers)

    def reader_of(rows):
        there = build.at(rows.path.parent)
        room = int(args.cache_gb * 1e9) // readers
        return stream.Reader(there, args.workers, room, store and store.at(there))

    def load(row, hint=None, reader=None):
        """A prompt's inputs; when the towers are frozen their outputs, which never change."""
        reader = reader or train_reader
        prompt = reader.get(row, hint)
        if not args.train_towers and not prompt.encoded:
            with torch.no_grad():
                media = policy.encode([prompt])[0]
            prompt = prompt._replace(media={name: value.cpu() for name, value in media.items()})
            reader.put(row, prompt)
        return prompt

    train_reader, held_out_reader = reader_of(rows), held_out_rows and reader_of(held_out_rows)

    # ---- what a checkpoint holds beside the weights
    replay = buffer.ReplayBuffer(args.buffer_size, WINDOW)
    schedule = hints.HintSchedule(args.hint_patience, args.hint_kl)
    health = metrics.Health(args.max_ratio, args.min_entropy)
    source_rows = stream.Stream(
        rows, train_reader.prefetch, load, args.prompts_per_step, args.seed, args.max_bad_frac
    )
    refused, start, num_generated = set(), 0, 0
    if args.resume and (state := checkpoint.load(out, policy, optimizer)):
        start, num_generated, health.state = (state[k] for k in ("step", "num_generated", "health"))
        refused.update(state["refused"])
        replay.load_state_dict(state["buffer"])
        schedule.load_state_dict(state["hints"])
        source_rows.load_state_dict(state["rows"])
    run.begin(out, args, start)
    steps = args.steps or -(-len(rows) // args.prompts_per_step)
    run.print0(f"  {len(rows)} rows, {steps} steps of {args.prompts_per_step}, from step {start}")

    def small_state():
        """What a step changes before it is sure to count."""
        parts = dict(health=dict(health.state), hints=schedule.state_dict())
        parts |= dict(rows=source_rows.state_dict(), refused=sorted(refused))
        return parts | dict(num_generated=num_generated)

    def save(step, state):
        state = state | dict(buffer=replay.state_dict())
        checkpoint.save(out, step, policy, optimizer, state, args.keep)

    def draw(step, again):
        """Stored groups, the same on every rank, as all hold the same buffer.       [DRAW] [SPLIT]"""
        wanted = args.prompts_per_step if args.num_off else 0
        rng = np.random.default_rng([args.seed, step, again, 1] if again else [args.seed, step])
        return replay.draw(wanted, args.num_off or 1, step, rng, (), args.max_staleness)

    def read_replayed(step, drawn):
        """
        -> {place in `drawn`: Prompt}, this rank's. A clip that is gone by now leaves `drawn` and the
        buffer, on all ranks together.
        """
        own = {}
        for i in range(len(drawn))[run.rank() :: run.world_size()]:
            for e in drawn[i][:1]:
                row = rows[rows.index(e.prompt_id)]
                own[i] = (row, row.get("hint") if e.hinted else None)
        prompts, gone = stream.read_all(load, own)
        for i, problem in gone.items():
            bar.write(f"step {step:4d}/{steps}  no longer replayed: {problem}")
            source_rows.bad[rows.index(drawn[i][0].prompt_id)] = problem
            replay.forget(drawn[i][0].prompt_id)
            drawn[i] = []
        return prompts

    def gradient_of_replayed(step, drawn):
        """Adds that of alpha J_off -> infos, advantages; what is gone leaves `drawn`."""
        prompts = read_replayed(step, drawn)
        replayed = [e for group in drawn for e in group]
        advantages = replay_advantages(
            torch.tensor([e.reward for e in replayed]),
            torch.tensor([replay.mean_reward(e.prompt_id) for e in replayed]),
        ).split([len(group) for group in drawn])
        weight = args.off_policy_coef / max(len(replayed), 1)  # [J.off]
        groups = [(prompt, drawn[i], advantages[i], weight) for i, prompt in prompts.items()]
        return update.update(policy, reference, groups, filler, step, args), advantages

    def hint_of(row):
        """The row's hint, unless it gives the answer away: then it is refused, and that is told."""
        q, hint = row["prompt_id"], row.get("hint") if args.hints else None
        if hint and q not in refused:
            if reason := hints.hint_leak(hint, *data.truth(row)):
                refused.add(q)
                run.print0(f"hint refused: {q}: {reason}")
        return None if q in refused else hint

    def evaluate():
        read = functools.partial(load, reader=held_out_reader)
        return held_out_rows and held_out.accuracy(policy, read, held_out_rows, build, args)

    # ---- loop
    before = accuracy = evaluate() if start == 0 else None
    if before is not None:
        run.print0(f"held-out accuracy before training: {before:.3f}")
    mine = run.share(args.prompts_per_step)  # this rank's slice of every step's prompts
    source_rows.read_ahead()
    run.watch_signals()
    bar = run.progress(start, steps, f"stage {args.stage} {args.algo}")
    for step in range(start + 1, steps + 1):
        began, before_step = time.perf_counter(), small_state()
        step_rows, prompts, bad = source_rows.take()
        for problem in bad:
            bar.write(f"step {step:4d}/{steps}  replaced: {problem}")
        ids = [row["prompt_id"] for row in step_rows]

        # ---- what to replay
        drawn = draw(step, again=0)
        drawn += [[]] * (args.prompts_per_step - len(drawn))  # little stored: more fresh ones [U6]
        for group in filter(None, drawn[run.rank() :: run.world_size()]):
            train_reader.prefetch(rows[rows.index(group[0].prompt_id)])

        # ---- who gets a hint                                                           [HINT]
        events, stored = [], {}
        told = {row["prompt_id"]: (row, text) for row in step_rows if (text := hint_of(row))}
        if args.hints:
            for row, prompt in zip(step_rows[mine], prompts):
                q = row["prompt_id"]
                entries = [e for e in replay.entries_of(q, step) if not e.hinted][-KL_SAMPLES:]
                if entries and q in told and schedule.needs_kl(q, replay.tier(q)):
                    stored[q] = (prompt, entries)
            kls = update.stored_kls(policy, stored, filler, args.temperature)
            for q in dict.fromkeys(ids):  # once, also if the end of an epoch brings a prompt twice
                events.append((schedule.observe(q, replay.tier(q), kls.get(q)), q))
        hint = {q: row_and_text for q, row_and_text in told.items() if schedule.due(q)}

        # ---- roll out
        own = {q: hint[q] for q in ids[mine] if q in hint}
        hinted_prompts, too_long = stream.read_all(load, own)
        for q, problem in too_long.items():
            refused.add(q)
            hint.pop(q)
            run.print0(f"hint refused: {problem}")
        prompts = [hinted_prompts.get(q, prompt) for q, prompt in zip(ids[mine], prompts)]
        data_s = time.perf_counter() - began
        num_fresh = [args.num_on + args.num_off - len(group) for group in drawn]
        seeds = [run.seed(args.seed, step, i) for i in range(args.prompts_per_step)]
        rolled, texts, size = [], [], -(-len(prompts) // args.rollout_parts)
        for first in range(0, len(prompts), size):
            part = slice(first, first + size)
            rolled += model.rollout(
                policy, prompts[part], num_fresh[mine][part], args.temperature,
                args.max_new_tokens, build.eos_ids, seeds[mine][part],
            )  # fmt: skip
            texts += [build.texts(group) for group in rolled[part]]
            if judged:  # it thinks from here on, also while the replayed gradient is made
                for row, group_texts in zip(step_rows[mine][part], texts[part]):
                    judged.begin(row, group_texts)
        if not all(run.gather(all(c.logprobs.isfinite().all() for g in rolled for c in g))):
            raise run.UserError(
                f"step {step}: the policy's log-probs are not finite, its weights are broken: start a "
                "new --out with a lower --lr, or remove the newest checkpoints and --resume"
            )
        source_rows.read_ahead()
        rollout_s = time.perf_counter() - began - data_s

        # ---- while a judge thinks: the gradient that needs no fresh reward
        began_update, early = time.perf_counter(), None
        if judged and args.flat_groups == "keep":
            early = gradient_of_replayed(step, drawn)

        # ---- reward; then every rank knows what every rank made
        began_reward, made = time.perf_counter(), []
        for row, group, group_texts in zip(step_rows[mine], rolled, texts):
            q, means = row["prompt_id"], [c.logprobs.mean().item() for c in group]
            scored = rewards.reward_completions(row, group_texts, means, reward_weights, judged)
            # what could not be judged has no reward: it leaves the group and is not counted as 0
            made.append([
                buffer.Entry(q, c.ids, c.logprobs, reward, parts, step, q in hint)
                for c, (reward, parts) in zip(group, scored)
                if reward is not None
            ])  # fmt: skip
        made = [group for part in run.gather(made) for group in part]
        num_made, reward_s = sum(map(len, made)), time.perf_counter() - began_reward
        unjudged_frac = 1 - num_made / sum(num_fresh)
        if unjudged_frac > args.max_unjudged_frac or not num_made:
            save(step - 1, before_step)
            why = f"step {step}: {unjudged_frac:.0%} of the completions could not be judged"
            why += f", over --max-unjudged-frac: {judge.reason(run.gather(judged.why))}"
            raise run.UserError(f"{why}; the state before it is saved: {run.how_to_go_on()}")

        # ---- update, and again with other stored groups: b is still near for the fresh ones [U19]
        for again in range(args.updates_per_rollout):
            used, drawn = made, draw(step, again) if again else drawn
            if args.flat_groups == "replace" and args.num_off:
                rng = np.random.default_rng([args.seed, step, again, 2])
                given = (args.num_off, step, rng, args.max_staleness)
                used, drawn = replay.replace_flat(made, drawn, *given)
            infos, past = (not again and early) or gradient_of_replayed(step, drawn)
            used = used if any(drawn) else made  # if no stored clip could be read, all fresh stay
            fresh = [group_advantages(torch.tensor([e.reward for e in group])) for group in used]
            weight = 1 / max(sum(map(len, used)), 1)  # [J.on]
            groups = [(p, used[i], fresh[i], weight) for i, p in enumerate(prompts, mine.start)]
            infos = infos + update.update(policy, reference, groups, filler, step, args)
            info = {name: torch.cat([part[name] for part in infos]) for name in infos[0]}
            norm = optim.clip_grad_norm(policy, args.max_grad_norm)
            optim.set_lr(optimizer, args.lr, step, steps, args.warmup_frac, args.cosine)
            if not again:
                of_first = (info, norm, fresh, past)  # what the step reports
            drift = info["log_ratio"] / info["num_tokens"]  # a stored one may be given up: ratio 0
            ratio = torch.where(info["fresh"], drift.abs(), drift).max().exp().item()
            if problem := health.bad_step(info["loss"].sum().item(), norm, ratio, again):
                seen = sorted({*ids, *(e.prompt_id for group in drawn for e in group)})
                problem = f"step {step}: {problem}; its prompts: {', '.join(seen)}"
                stop = args.on_bad_step == "stop" or health.state["in_a_row"] >= metrics.PATIENCE
                if stop and not again:  # a later one is left out: the step has moved the weights
                    before_step["health"]["in_a_row"] = 0
                    save(step - 1, before_step)
                    raise run.UserError(f"{problem}; {run.after_bad_step()}")
                bar.write(f"skipped: {problem}")
                optimizer.zero_grad()
                break
            optimizer.step()
            optimizer.zero_grad()
        info, grad_norm, fresh_advantages, off_advantages = of_first
        update_s = time.perf_counter() - began_update - reward_s
        judge_s, judge_wait_s = judged.times() if judged else (0.0, 0.0)

        # ---- remember
        for group in filter(None, made):
            if not group[0].hinted:  # R̄(q) is what the policy earns by itself     [R.mean] [U8]
                replay.observe(group[0].prompt_id, [e.reward for e in group])
        if args.num_off:  # once: it ranks all prompts seen so far
            replay.add([e for group in made for e in group])
        num_generated += sum(num_fresh)

        # ---- report
        step_s = time.perf_counter() - began
        evaluated = args.eval_every and (step % args.eval_every == 0 or step == steps)
        accuracy = evaluate() if evaluated else accuracy
        report = dict(step=step, completions_generated=num_generated)
        report |= metrics.step_metrics(info, made, fresh_advantages, off_advantages, build.eos_ids)
        report |= replay.stats(step) | {
            "rewards/unjudged_frac": unjudged_frac,
            "hints/frac": sum(q in hint for q in ids) / len(ids),
            "hints/entered": schedule.entered,
            "hints/withdrawn": schedule.withdrawn,
            "steps_skipped": health.state["skipped"],
            "data/bad_rows": len(source_rows.bad),
            "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_s": report["num_valid_tokens"] / step_s,
            "time/data_s": data_s,
            "time/rollout_s": rollout_s,
            "time/update_s": update_s,
            "time/judge_s": judge_s,
            "time/judge_wait_s": judge_wait_s,
        }
        if evaluated and accuracy is not None:
            report["eval/acc"] = accuracy
        run.log(out / "metrics.jsonl", report)
        if step % SAMPLE_EVERY == 1:
            advantages = group_advantages(torch.tensor([e.reward for e in made[0]]))
            for sample in metrics.samples(step, made[0], advantages, replay, build.tokenizer, rows):
                run.log(out / "samples.jsonl", sample)
        for event, q in events:
            if event:
                bar.write(f"step {step:4d}/{steps}  hint {event}: {q}")
        bar.write(metrics.step_line(report, steps))
        bar.update()
        if problem := health.collapse(report):
            since = step - metrics.PATIENCE + 1
            told = f"{problem}: the policy has collapsed at step {since}"
            raise run.UserError(f"step {step}: {told}: start a new --out with a lower --lr")
        signal = run.stop_asked()
        if signal or (args.save_every and step % args.save_every == 0):
            save(step, small_state())
        if signal and step < steps:
            line = f"step {step} is saved; go on with: {run.how_to_go_on()}"
            raise run.Stopped(line, 128 + signal)
    bar.close()
    model.save(policy, out / "final", build.processor)
    if before is not None:
        after = f"{accuracy:.3f} after {num_generated} completions"
        run.print0(f"held-out accuracy: {before:.3f} before, {after}")
    run.print0(f"saved {out / 'final'}")


if __name__ == "__main__":
    run.main_guard(main)
