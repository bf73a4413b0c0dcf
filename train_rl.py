"""
Stages 1 to 3 of AVATAR, arXiv:2508.03100: GRPO with stratified replay, temporal advantage shaping
and hints; `--algo grpo` is the plain baseline. Where we differ or the paper is silent: docs/method.md.

    python train_rl.py --stage 2                                                    # the toy, CPU
    torchrun train_rl.py --stage 2 --model runs/sft/final --data av.jsonl                  # 1 GPU
    torchrun --nproc-per-node 8 train_rl.py --stage 2 --model runs/sft/final --data av.jsonl

A step: draw what to replay (that decides how many fresh completions are needed), roll out, reward,
compare each fresh completion with its group and each replayed one with its prompt's history,
spread the advantages over the tokens, take a gradient step, store the fresh completions.

An Entry (buffer.py) is one completion with its reward; it is fresh if it was born in this step.
P prompts a step, over all ranks; `mine` is this rank's slice of them.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import functools

import numpy as np
import torch

import hints
import rewards
import tas
import toy
from buffer import Entry, ReplayBuffer
from data.clip_cache import ClipCache
from data.clips import BadRow
from data.media_flags import add_media_flags, media_config_from
from data.row_stream import RowStream
from data.rows import Rows
from grpo import group_advantages, grpo_loss, replay_advantages  # noqa: F401  offered from here
from models.inputs import InputBuilder
from models.loading import open_policies, write_merged
from models.paths import resolve_start_model, save_model
from models.rollout import rollout
from rl import gradient, guards, held_out, metrics, samples
from rl.gradient import concat_infos, fresh_gradient
from rl.hint_visits import give_hints
from run import arguments, checkpoint, logs, optim, processes
from run.errors import UserError
from run.launch import run_main
from run.run_dir import open_run_dir
from run.signals import save_and_maybe_stop, watch_signals
from teachers import judge

WINDOW = 20  # on-policy rewards that R̄(q) is the mean of (authors' script)

STAGES = {  # a typed flag wins
    1: dict(reward_weights="format=.5,acc=.5"),  # paper: general visual reasoning
    2: dict(reward_weights="format=.2,acc=.4,self=.4"),  # paper: audio-visual
    3: dict(reward_weights="format=.5,judge=.5"),  # paper: format + judge; the weights are [U14]
}
ALGOS = {
    "avatar": {},
    "avatar-gspo": dict(
        clip_eps=0.005
    ),  # one ratio per completion: a mean, which moves less than its tokens [U22]
    "grpo": dict(
        num_on=8, num_off=0, tas_shape="uniform", hints=False
    ),  # paper: 8 fresh, nothing else
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    boolean = argparse.BooleanOptionalAction
    flag = arguments.add_flags(parser)
    flag("--lora-rank", type=int, default=16, help="0 = full fine-tuning (paper: 16)")
    flag("--train-towers", action=boolean, default=False, help="vision and audio towers too [D1]")
    add_media_flags(parser)
    flag = parser.add_argument_group("method").add_argument
    flag("--stage", type=int, choices=[1, 2, 3], default=2, help="visual, audio-visual, places")
    flag(
        "--algo",
        choices=[*ALGOS],
        default="avatar",
        help="avatar-gspo: one ratio a completion [U22]; grpo: 8 fresh",
    )
    flag("--reward-weights", default="format=.5,acc=.5", help="format, acc, self, judge [R.stage]")
    flag("--judge", help="scores reasoning steps: URL of a chat server, folder, toy [R.judge] [D5]")
    flag("--judge-model", help="the judge's name on its server")
    flag("--clip-eps", type=float, default=0.2, help="clip of the ratio, both sides (script) [J]")
    flag("--kl-coef", type=float, default=0.1, help="beta (paper); 0 = no reference [KL]")
    flag("--off-policy-coef", type=float, default=0.6, help="alpha (paper) [J] [D4]")
    shapes = [*tas.SHAPES, *(f"{shape}-mean1" for shape in tas.SHAPES)]
    told = f"weight of a token: {', '.join(tas.SHAPES)}; X-mean1: its mean is 1 [TAS.w] [U10]"
    flag("--tas-shape", choices=shapes, default="parabolic", metavar="SHAPE", help=told)
    flag("--tas-lambda", type=float, default=0.3, help="extra weight at the ends (paper) [TAS.w]")
    flag("--buffer-size", type=int, default=10000, help="completions (paper) [ROOM]")
    flag("--hints", action=boolean, default=True, help="for prompts that stay Hard [HINT]")
    flag("--hint-patience", type=int, default=2, help="visits in Hard before a hint [U7]")
    flag("--hint-kl", type=float, default=0.02, help="nats/token: below, the policy is stuck [U7]")
    flag = parser.add_argument_group("rollout").add_argument
    flag("--prompts-per-step", type=int, default=8, help="fresh prompts, over all ranks [U18]")
    flag("--num-on", type=int, default=4, help="fresh completions a prompt (paper) [SPLIT]")
    flag("--num-off", type=int, default=4, help="replayed ones a prompt (paper); 0 = no replay")
    flag("--temperature", type=float, default=1.0, help="of sampling and of log-probs (script)")
    flag("--max-new-tokens", type=int, default=2048, help="length of a completion (script)")
    flag = parser.add_argument_group("optimisation and evaluation").add_argument
    flag("--lr", type=float, default=5e-7, help="peak learning rate (script)")
    flag("--updates-per-rollout", type=int, default=1, help="gradient steps a step [U19]")
    flag("--micro-tokens", type=int, default=16384, help="tokens read at once; less = less memory")
    flag("--max-ratio", type=float, default=10.0, help="of a completion: above it, a bad step")
    flag("--eval-data", help="held-out JSONL (default: the toy's, if --data is the toy's)")
    flag("--eval-every", type=int, default=100, help="steps between evaluations; 0 = none at all")
    flag("--eval-samples", type=int, default=256, help="held-out completions, at --temperature")

    def overrides(first):
        common = dict(out=f"runs/stage{first.stage}", steps=400)  # paper, Fig. 5: 400 iterations
        yield f"stage {first.stage}", common | STAGES[first.stage]
        yield first.algo, ALGOS[first.algo]
        if toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["rl"]
        if first.data is None:
            yield "toy", dict(judge="toy")

    args, source = arguments.parse(parser, argv, overrides)
    weights = arguments.parse_weights("--reward-weights", args.reward_weights, rewards.PARTS)
    if "judge" in weights and not args.judge:
        raise UserError("the judge part of the reward needs --judge: a URL or a folder")
    arguments.check_bounds(
        args,
        **arguments.BOUNDS,
        num_off=0,
        num_on=1 if args.num_off else 2,
        prompts_per_step=1,
        buffer_size=max(
            1, -(-5 * args.num_off // 2)
        ),  # Hard's 40 % have to hold what is drawn at once
        max_new_tokens=1,
        temperature=1e-3,
        clip_eps=0,
        kl_coef=0,
        tas_lambda=0,
        hint_patience=1,
        hint_kl=1e-9,
        eval_every=0,
        eval_samples=1,
        updates_per_rollout=1,
        max_ratio=0,
        off_policy_coef=0,
    )
    return args, source, weights


# ---- what a step is made of --------------------------------------------------------------------


def draw(replay, args, step, again=0):
    """Stored groups, the same on every rank, as all hold the same buffer.            [DRAW] [SPLIT]"""
    wanted = args.prompts_per_step * (args.num_off > 0)
    rng = np.random.default_rng([args.seed, step, again, 1] if again else [args.seed, step])
    return replay.draw(wanted, args.num_off or 1, step, rng)


def score(step, step_rows, groups, texts, weights, judged, hinted):
    """
    Fresh completions with their rewards, of all ranks                                  [R.stage]

    returns  list of lists of Entry, a prompt each; what could not be judged has no reward: it leaves
             its group and is not counted as 0
    """
    made = []
    for row, group, group_texts in zip(step_rows, groups, texts):
        q, means = row["prompt_id"], [c.logprobs.mean().item() for c in group]
        scored = rewards.reward_completions(row, group_texts, means, weights, judged)
        made.append(
            [
                Entry(q, c.ids, c.logprobs, reward, parts, step, q in hinted)
                for c, (reward, parts) in zip(group, scored)
                if reward is not None
            ]
        )
    return [group for part in processes.all_gather_object(made) for group in part]


# ---- the run -----------------------------------------------------------------------------------


def main():
    args, source, reward_weights = parse_args()
    device = processes.init(args.device)
    out = open_run_dir(args, source)
    processes.check_multiple("--prompts-per-step", args.prompts_per_step)
    toy_model, toy_train, toy_test = toy.write_defaults(args.stage, args.model, args.data)

    # ---- rows, the policy, the reference it stays close to
    rows = Rows(args.data or toy_train)
    folder = resolve_start_model(args.model or toy_model, args.lora_rank, out, write_merged)
    recipe, root = media_config_from(args), rows.path.parent
    build = InputBuilder(folder, recipe, root, audio_captions=args.stage == 2)  # [U16]
    judged = None
    if "judge" in reward_weights:
        judged = judge.open_judge(args, root, recipe, out, device, toy.judge)
    policy, reference = open_policies(
        folder,
        device=device,
        dtype=args.dtype,
        attn=args.attn,
        lora_rank=args.lora_rank,
        train_towers=args.train_towers,
        with_reference=args.kl_coef > 0,
    )
    optimizer = optim.adamw(policy, args.lr)
    filler = (build.filler, [Entry("", build.filler.input_ids, torch.zeros(2), 0.0, {}, 0, False)])
    held_out_file = args.eval_every and (args.eval_data or (None if args.data else toy_test))
    encoder = None if args.train_towers else policy  # frozen towers encode a clip once
    room = int(args.cache_gb * 1e9) // (2 if held_out_file else 1)
    clip_cache = ClipCache(build, room, encoder)
    evaluate = held_out.evaluator(held_out_file, policy, build, room, encoder, args)

    # ---- what a checkpoint holds beside the weights
    replay = ReplayBuffer(args.buffer_size, WINDOW)
    schedule = hints.HintSchedule(args.hint_patience, args.hint_kl)
    stream = RowStream(rows, clip_cache, rows_per_step=args.prompts_per_step, seed=args.seed)
    watch, start, num_generated, before = (
        guards.StepGuard(args.max_ratio),
        0,
        0,
        None,
    )
    if args.resume and (found := checkpoint.load(out, policy, optimizer)):
        start, num_generated, before = found["step"], found["num_generated"], found.get("before")
        checkpoint.restore(found, buffer=replay, hints=schedule, rows=stream, health=watch)
    count = args.steps or -(-len(rows) // args.prompts_per_step)
    log, shown = logs.begin(out, args, start), samples.Samples(out, rows, build, count)
    processes.print0(
        f"  {len(rows)} rows, {count} steps of {args.prompts_per_step}, from step {start}"
    )

    def small_state():
        """What a step changes before it is sure to count."""
        parts = checkpoint.states(hints=schedule, rows=stream, health=watch)
        return parts | dict(num_generated=num_generated, before=before)

    def save(step, small):
        state = small | checkpoint.states(buffer=replay)
        checkpoint.save(out, step, policy, optimizer, state, args.keep)

    def replayed_gradient(drawn):
        """That of alpha J_off; a clip that is gone by now leaves `drawn` and the buffer."""
        stored = stream.replayed_prompts(drawn, replay, steps)
        given = (policy, reference, stored, drawn, replay.mean_reward, filler, steps.step, args)
        return gradient.replayed_gradient(*given)

    accuracy = None
    if start == 0 and (before := evaluate()) is not None:
        processes.print0(f"held-out accuracy before training: {before:.3f}")
    mine = processes.local_slice(args.prompts_per_step)
    stream.prefetch_next()
    watch_signals()
    steps = processes.Steps(start, count, f"stage {args.stage} {args.algo}")
    for step in steps:
        clock, before_step = metrics.Clock(), small_state()
        save_before = functools.partial(save, step - 1, before_step)
        step_rows, prompts = stream.next_rows(steps)
        ids = [row["prompt_id"] for row in step_rows]

        # ---- what to replay: where little is stored, more fresh ones                  [SPLIT] [U6]
        drawn = draw(replay, args, step)
        drawn += [[]] * (args.prompts_per_step - len(drawn))
        num_fresh = [args.num_on + args.num_off - len(group) for group in drawn]
        stream.prefetch_replayed(drawn)

        # ---- who gets a hint                                                           [HINT]
        hinted = set()
        if args.hints:
            given = (policy, filler, steps, step_rows, prompts, args)
            prompts, hinted = give_hints(replay, schedule, clip_cache, *given)
        clock.lap("data")

        # ---- roll out; a judge begins to think
        seeds = [processes.seed(args.seed, step, i) for i in range(args.prompts_per_step)]
        groups = rollout(
            policy,
            prompts,
            num_fresh[mine],
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            eos_ids=build.eos_ids,
            seeds=seeds[mine],
            micro_tokens=args.micro_tokens,
        )
        guards.stop_if_broken(step, groups)
        texts = [build.texts(group) for group in groups]
        if judged:
            judged.begin(step_rows[mine], texts)
        stream.prefetch_next()
        clock.lap("rollout")

        # ---- meanwhile the half of the gradient that needs no fresh reward           [VCRS.A] [J.off]
        past, off_advantages = replayed_gradient(drawn)
        clock.lap("update")

        # ---- reward; then every rank knows what every rank made                      [R.stage]
        made = score(step, step_rows[mine], groups, texts, reward_weights, judged, hinted)
        unjudged_frac = 1 - sum(map(len, made)) / sum(num_fresh)
        judge.stop_if_unjudged(step, unjudged_frac, judged, save_before)
        clock.lap("reward")

        # ---- advantages, their shape, the gradient of J; again, while b is near, with other stored
        # groups                                                [GRPO.A] [TAS.A] [J.on] [J] [U19]
        for again in range(args.updates_per_rollout):
            if again:
                drawn = draw(replay, args, step, again)
                past, off_advantages = replayed_gradient(drawn)
            fresh, advantages = fresh_gradient(policy, reference, prompts, made, filler, step, args)
            info = concat_infos(past + fresh)
            grad_norm = optim.clip_grad_norm(policy)
            if not again:
                watch.report_grad_spike(info, grad_norm, steps.tell)
                first = (info, made, advantages, drawn, off_advantages, grad_norm)  # is reported
            loss = info["loss"].sum().item()
            problem = watch.bad_step(loss, grad_norm, guards.worst_ratio(info), again)
            seen = {*ids, *(e.prompt_id for group in drawn for e in group)}
            saves = None if again else save_before
            if watch.refuses(problem, seen, steps, args.on_bad_step, saves):
                optimizer.zero_grad()
                break
            optim.step(optimizer, args.lr, step, count, cosine=False)
        clock.lap("update")

        # ---- show some, remember all
        shown.write(step, replay, *first[:-1])
        for group in filter(None, made):
            if not group[0].hinted:  # R̄(q) is what the policy earns by itself     [R.mean] [U8]
                replay.observe(group[0].prompt_id, [e.reward for e in group])
        if args.num_off:  # once: it ranks all prompts seen so far             [ROOM] [TIER]
            replay.add([e for group in made for e in group])
        num_generated += sum(num_fresh)

        # ---- report
        info, _, advantages, _, off_advantages, grad_norm = first
        step_s = clock.total()
        evaluated = args.eval_every and (step % args.eval_every == 0 or step == count)
        accuracy = evaluate() if evaluated else accuracy
        report = dict(step=step, completions_generated=num_generated)
        report |= metrics.step_metrics(info, made, advantages, off_advantages, build.eos_ids)
        report |= (
            replay.stats(step)
            | watch.report()
            | schedule.report()
            | clock.report(judged)
            | {
                "rewards/unjudged_frac": unjudged_frac,
                "data/bad_rows": len(stream.bad_rows),
                "hints/frac": sum(q in hinted for q in ids) / len(ids),
                "grad_norm": grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                "tokens_per_s": report["num_valid_tokens"] / step_s,
            }
        )
        if evaluated and accuracy is not None:
            report |= {"eval/acc": accuracy} | ({} if before is None else {"eval/before": before})
        log(report, show=evaluated)
        steps.tell(metrics.step_line(report))
        watch.stop_if_collapsed(report)
        save_and_maybe_stop(step, count, args.save_every, lambda: save(step, small_state()))
    save_model(policy, out / "final", build.processor)
    if before is not None and accuracy is not None:
        processes.print0(
            f"held-out accuracy: {before:.3f} before, {accuracy:.3f} after {num_generated} completions"
        )
    processes.print0(f"saved {out / 'final'}")


if __name__ == "__main__":
    run_main(main, BadRow)
