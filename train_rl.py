"""
Stages 1 to 3 of AVATAR, arXiv:2508.03100: GRPO with stratified replay, temporal advantage shaping
(TAS) and hints. `--algo grpo` is the plain baseline. Differences from the paper, and what it leaves
open: docs/method.md. A tag in brackets is a row of the README's table or of that page.

    python train_rl.py --stage 2                                                     # the toy, CPU
    torchrun train_rl.py --stage 2 --model runs/sft/final --data av.jsonl                   # 1 GPU
    torchrun --nproc-per-node 8 train_rl.py --stage 2 --model runs/sft/final --data av.jsonl

A step: draw the completions to replay; put hints into the prompts that need one; sample fresh
completions (more of them if too few are replayed); reward them; compare each fresh completion with its
group and each replayed one with the history of its prompt; weight the advantages over the tokens; take
the gradient of the clipped, KL-regularised objective; store the fresh completions.
"""

# An Entry (buffer.py) is one completion with its reward. It is fresh if it was born in this step.
# P prompts per step, over all ranks; `local` is this rank's slice of them. G fresh completions of a
# prompt. N completions in a micro-batch, T tokens of the longest.

import run.before_torch  # noqa: F401  must come before torch

import argparse
import functools
import math

import rewards
import toy
from data.media_flags import add_media_flags, check_media_flags, media_config_from
from run import arguments
from run.errors import UserError

TAS_SHAPES = ("parabolic", "uniform", "linear-up", "linear-down", "inverse")  # as in tas.py

STAGES = {  # a typed flag wins
    1: dict(reward_weights="format=.5,acc=.5"),  # paper: general visual reasoning
    2: dict(reward_weights="format=.2,acc=.4,self=.4"),  # paper: audio-visual
    3: dict(reward_weights="format=.5,judge=.5"),  # paper: format + judge; the weights are [U14]
}
ALGOS = {
    "avatar": {},
    # a mean over the tokens varies far less than single tokens: its clip is narrower   [U22]
    "avatar-gspo": dict(clip_eps=0.005),
    # paper: 8 fresh completions, no replay, no shaping, no hints
    "grpo": dict(num_on=8, num_off=0, tas_shape="uniform", hints=False),
}


# The authors' 5e-7 is for full weights. An adapter starts at 0, and at that rate it stays below the
# rounding of bfloat16 for hundreds of steps (docs/gpus.md); its peers train at 1e-5 to 5e-5.
LORA = dict(lr=1e-5)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    boolean = argparse.BooleanOptionalAction
    hidden = argparse.SUPPRESS
    # fmt: off

    flag = arguments.add_flags(parser)
    flag("--lora-rank", type=int, default=16, help="rank of the adapter (paper: 16); 0 = train all weights of the text model")
    flag("--lora-experts", action=boolean, default=False, help="adapter on the experts too, not on attention alone (Qwen3-Omni)")
    flag("--replay-experts", action=boolean, default=False, help="the update takes the experts that the rollout took (Qwen3-Omni, docs/qwen3.md)")
    flag("--train-towers", action=boolean, default=False, help="train the vision and audio towers too [D1]")
    add_media_flags(parser)

    flag = parser.add_argument_group("method").add_argument
    flag("--stage", type=int, choices=[1, 2, 3], default=2, help="1 visual, 2 audio-visual, 3 audio localisation: chooses the reward")
    flag("--algo", choices=[*ALGOS], default="avatar", help="avatar-gspo: one ratio per completion [U22]; grpo: the baseline, 8 fresh completions and nothing else")
    flag("--reward-weights", default="format=.5,acc=.5", help="weights of format, acc, self, judge [R.stage]")
    flag("--judge", help="scores the reasoning steps: URL of a chat server, model folder, or toy [R.judge] [D5]")
    flag("--judge-model", help="name of the judge on its server")
    flag("--clip-eps", type=float, default=0.2, help="clip of the ratio, both sides (authors' script) [J]")
    flag("--kl-coef", type=float, default=0.1, help="weight beta of the KL (paper); 0 = no reference [KL]")
    flag("--off-policy-coef", type=float, default=0.6, help="weight alpha of the replayed half (paper) [J] [D4]")
    shapes = [*TAS_SHAPES, *(f"{shape}-mean1" for shape in TAS_SHAPES)]
    shape_help = f"weight of a token by its place: {', '.join(TAS_SHAPES)}; X-mean1 scales the mean weight to 1 [TAS.w] [U10]"
    flag("--tas-shape", choices=shapes, default="parabolic", metavar="SHAPE", help=shape_help)
    flag("--tas-lambda", type=float, default=0.3, help="extra weight of the first and last token (paper) [TAS.w]")
    flag("--buffer-size", type=int, default=10000, help="completions stored (paper) [ROOM]")
    flag("--hints", action=boolean, default=True, help="give hints to prompts that stay hard [HINT]")
    flag("--hint-patience", type=int, default=2, help="visits in Hard without success before a hint; the first counts [U7]")
    flag("--hint-kl-threshold", type=float, default=0.02, help="give a hint only if KL(behaviour || policy) is below this, nats per token [U7]")
    flag("--hint-kl", type=float, dest="hint_kl_threshold", default=hidden, help=hidden)

    flag = parser.add_argument_group("rollout").add_argument
    flag("--prompts-per-step", type=int, default=8, help="fresh prompts per step, over all ranks [U18]")
    flag("--num-on", type=int, default=4, help="fresh completions per prompt (paper) [SPLIT]")
    flag("--num-off", type=int, default=4, help="replayed completions per prompt (paper); 0 = no replay")
    flag("--temperature", type=float, default=1.0, help="sampling temperature, also used for log-probs (authors' script)")
    flag("--max-new-tokens", type=int, default=2048, help="tokens of a completion at most (authors' script)")
    flag("--rollout-prompts", type=int, default=0, metavar="N", help="prompts that each process decodes at one time; lower it to save memory; 0 = all")

    flag = parser.add_argument_group("optimisation and evaluation").add_argument
    flag("--lr", type=float, default=5e-7, help="peak learning rate: 5e-7 for full weights (authors' script), 1e-5 with LoRA (ours)")
    flag("--updates-per-rollout", type=int, default=1, help="gradient steps per rollout [U19]")
    flag("--micro-tokens", type=int, default=16384, help="tokens per forward pass; lower it to save memory")
    flag("--max-seq-ratio", type=float, default=10.0, help="a step is bad if the mean ratio of any completion exceeds this; 0 = no limit")
    flag("--max-ratio", type=float, dest="max_seq_ratio", default=hidden, help=hidden)
    flag("--eval-data", help="held-out JSONL; without it the toy's, if --data is the toy's")
    flag("--eval-every", type=int, default=100, help="steps between evaluations; 0 = never")
    flag("--eval-samples", type=int, default=256, help="held-out completions, sampled at --temperature")

    # fmt: on

    def overrides(first):
        common = dict(out=f"runs/stage{first.stage}", steps=400)  # paper, Fig. 5: 400 iterations
        yield f"stage {first.stage}", common | STAGES[first.stage]
        if first.lora_rank > 0:
            yield "LoRA", LORA
        yield first.algo, ALGOS[first.algo]
        if toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["rl"]
        if first.data is None:
            yield "toy", dict(judge="toy")

    args, source = arguments.parse(parser, argv, overrides)
    reward_weights = arguments.parse_weights("--reward-weights", args.reward_weights, rewards.PARTS)
    if "judge" in reward_weights and not args.judge:
        raise UserError("the judge part of the reward needs --judge: a URL or a folder")
    check_media_flags(args)
    arguments.check_bounds(
        args,
        **arguments.BOUNDS,
        num_off=0,
        num_on=1 if args.num_off else 2,  # one fresh completion alone has no advantage
        prompts_per_step=1,
        rollout_prompts=0,
        # Hard prompts have 40 % of the room: it must hold one replayed group
        buffer_size=max(1, math.ceil(args.num_off / 0.40)),
        max_new_tokens=1,
        temperature=1e-3,
        clip_eps=0,
        kl_coef=0,
        tas_lambda=0,
        hint_patience=1,
        hint_kl_threshold=1e-9,
        eval_every=0,
        eval_samples=1,
        updates_per_rollout=1,
        max_seq_ratio=0,
        off_policy_coef=0,
    )
    return args, source, reward_weights


if __name__ == "__main__":
    arguments.answer_early(parse_args)  # --help and mistakes answer before torch is loaded

import numpy as np
import torch

from buffer import Entry, ReplayBuffer
from data.clip_cache import ClipCache
from data.clips import BadRow
from data.row_stream import RowStream
from data.rows import Rows
from grpo import group_advantages, grpo_loss, replay_advantages
from hints import HintSchedule
from models.inputs import InputBuilder
from models.loading import open_policies
from models.paths import resolve_start_model, save_model
from models.policy import completion_logprobs
from models.rollout import rollout
from run import checkpoint, devices, logs, optim, processes
from run.errors import out_of_memory_advice
from run.launch import run_main
from run.run_dir import open_run_dir
from run.signals import save_and_maybe_stop, watch_signals
from tas import shape_advantages, tas_weights
from teachers.judge import open_judge, stop_if_unjudged
from training import guards, metrics
from training.held_out import HeldOut
from training.hint_visits import HintVisits
from training.micro_batches import WeightedGroup, add_ref_logprobs, dummy_group, pack
from training.page import RunPage
from training.samples import SampleLog

WINDOW = 20  # on-policy rewards in R̄(q) (authors' script)                               [R.mean]


# ---- parts of a step ---------------------------------------------------------------------------


def draw_replayed(buffer, args, step, update=0):
    """
    Stored groups to replay. Every rank draws the same: all hold the same buffer.  [DRAW] [SPLIT]

    returns   list of P lists of num_off Entry, of one prompt each; [] where too little is stored
    """
    groups = []
    if args.num_off > 0:
        seed_parts = [args.seed, step]
        if update > 0:
            seed_parts += [update, 1]  # the 1: numpy takes [seed, step, 0] for [seed, step]
        rng = np.random.default_rng(seed_parts)
        groups = buffer.draw(args.prompts_per_step, args.num_off, step, rng)
    num_missing = args.prompts_per_step - len(groups)
    return groups + [[] for _ in range(num_missing)]


def reward_and_gather(rows, completions, texts, *, step, hinted, reward_weights, judge):
    """
    The fresh completions of all ranks with their rewards.                              [R.stage]

    rows          this rank's; completions and texts: a list of G for each row
    hinted        set of prompt_ids
    returns       list of P lists of Entry. A completion that could not be judged leaves its group:
                  it does not count as 0.
    """
    score_reasoning = None
    if judge:
        judge.submit(rows, texts)  # in threads; judge.reward waits for each score
        score_reasoning = judge.reward
    groups = []
    for row, group, group_texts in zip(rows, completions, texts):
        prompt_id = row["prompt_id"]
        mean_logprobs = [completion.logprobs.mean().item() for completion in group]
        scored = rewards.reward_completions(
            row, group_texts, mean_logprobs, reward_weights, score_reasoning
        )
        entries = []
        for completion, (reward, reward_parts) in zip(group, scored):
            if reward is None:
                continue
            if not math.isfinite(reward):
                raise UserError(
                    f"step {step}, row {prompt_id}: reward {reward} of {reward_parts}: every part must be "
                    "a finite number (None: not judged)"
                )
            entry = Entry(
                prompt_id=prompt_id,
                completion_ids=completion.ids,
                old_logprobs=completion.logprobs,
                reward=reward,
                reward_parts=reward_parts,
                born_step=step,
                hinted=prompt_id in hinted,
            )
            entries.append(entry)
        groups.append(entries)
    return [group for part in processes.all_gather_object(groups) for group in part]


def flatten(groups):
    return [entry for group in groups for entry in group]


def rewards_of(entries):
    return torch.tensor([entry.reward for entry in entries])


@out_of_memory_advice("the update: lower --micro-tokens, also with --resume")
def add_gradient(
    policy, micro_batches, step, *, temperature, tas, clip_eps, kl_coef, sequence_ratio=False
):
    """
    Adds the gradient of J over micro-batches to the policy's parameters.       [TAS.A] [RATIO] [J]

    micro_batches  list of MicroBatch, as many on every rank
    tas            dict: shape, tas_lambda and equal_mean of shape_advantages
    returns        list of info dicts (metrics.completion_info), this rank's
    """
    infos = []
    for micro_batch in micro_batches:
        logprobs, completion_mask, entropy = completion_logprobs(  # (N, T) each
            policy, micro_batch.prompts, micro_batch.completions, temperature
        )
        # of the policy that sampled: the present one if fresh, an earlier one if replayed
        old_logprobs = micro_batch.padded("old_logprobs", like=logprobs)
        ref_logprobs = None
        if kl_coef > 0:
            ref_logprobs = micro_batch.padded("ref_logprobs", like=logprobs)
        token_advantages = shape_advantages(  # [TAS.A]
            micro_batch.advantages.to(logprobs), completion_mask, **tas
        )
        loss, info = grpo_loss(  # [RATIO] [KL] [J]
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            token_advantages=token_advantages,
            completion_mask=completion_mask,
            weights=micro_batch.weights.to(logprobs),
            clip_eps=clip_eps,
            kl_coef=kl_coef,
            sequence_ratio=sequence_ratio,
        )
        # the weights make a sum over all ranks, and FSDP takes the mean over ranks
        (loss * processes.world_size()).backward()

        if not micro_batch.is_dummy:
            info = metrics.completion_info(
                info,
                micro_batch,
                step,
                logprobs=logprobs,
                entropy=entropy,
                completion_mask=completion_mask,
                tas_weights=tas_weights(completion_mask, **tas),
            )
            infos.append(info)
    return infos


# ---- the run -----------------------------------------------------------------------------------


def warnings_about_rows(rows, held_out, prompts_per_step):
    """-> lines for the run's header.  held_out: HeldOut or None"""
    lines = []
    if len(rows) < prompts_per_step:
        lines.append(
            f"only {len(rows)} rows for {prompts_per_step} prompts per step: a step takes rows more than "
            "once, each time as a group of its own (--prompts-per-step)"
        )
    if held_out:
        num_shared = int(np.isin(held_out.rows.content_hashes, rows.content_hashes).sum())
        if num_shared:
            lines.append(
                f"{num_shared} of {len(held_out.rows)} held-out rows are also trained on: the held-out "
                "accuracy is not that of unseen rows (--eval-data)"
            )
    return lines


def main():
    args, source, reward_weights = parse_args()
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
    processes.check_multiple("--prompts-per-step", args.prompts_per_step)
    toy_model, toy_train, toy_test = toy.write_defaults(args.stage, args.model, args.data)
    tas_settings = dict(
        shape=args.tas_shape.removesuffix("-mean1"),
        tas_lambda=args.tas_lambda,
        equal_mean=args.tas_shape.endswith("-mean1"),  # [U10]
    )

    # ---- rows, the policy, and the reference that it stays close to
    rows = Rows(args.data or toy_train)
    folder = resolve_start_model(args.model or toy_model, args.lora_rank)
    media_config = media_config_from(args)
    root = rows.path.parent
    builder = InputBuilder(folder, media_config, root, audio_captions=args.stage == 2)  # [U16]
    judge = None
    if "judge" in reward_weights:
        judge = open_judge(
            args.judge,
            model_name=args.judge_model,
            media_folder=root,
            media_config=media_config,
            cache_dir=out / "judged",
            device=device,
            toy_score=toy.judge,
        )
    policy, reference = open_policies(
        folder,
        device=device,
        dtype=args.dtype,
        attn=args.attn,
        lora_rank=args.lora_rank,
        lora_experts=args.lora_experts,
        replay_experts=args.replay_experts,
        train_towers=args.train_towers,
        with_reference=args.kl_coef > 0,
    )
    optimizer = optim.adamw(policy, args.lr)
    dummy = dummy_group(builder.filler)

    # ---- clips: decoded ahead of the loop, encoded once if the towers are frozen
    eval_file = args.eval_data
    if eval_file is None and args.data is None:
        eval_file = toy_test
    is_evaluated = args.eval_every > 0 and eval_file is not None
    encoder = None if args.train_towers else policy
    cache_bytes = int(args.cache_gb * 1e9)
    if is_evaluated:
        cache_bytes //= 2
    clip_cache = ClipCache(builder, cache_bytes, encoder)
    held_out = None
    if is_evaluated:
        held_out = HeldOut(
            eval_file,
            policy,
            builder,
            cache_bytes=cache_bytes,
            encoder=encoder,
            num_samples=args.eval_samples,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            micro_tokens=args.micro_tokens,
            prompts_at_once=args.rollout_prompts,
            seed=args.seed,
        )

    # ---- what a checkpoint holds beside the weights
    buffer = ReplayBuffer(args.buffer_size, WINDOW)
    hint_schedule = HintSchedule(args.hint_patience, args.hint_kl_threshold)
    row_stream = RowStream(rows, clip_cache, rows_per_step=args.prompts_per_step, seed=args.seed)
    guard = guards.StepGuard(args.max_seq_ratio)
    progress = dict(num_generated=0, before=None)  # completions so far; accuracy before step 1
    start_step = 0
    if args.resume:
        state = checkpoint.load(out, policy, optimizer)
        if state:
            start_step = state["step"]
            progress = {name: state[name] for name in progress}
            checkpoint.restore(
                state,
                buffer=buffer,
                hint_schedule=hint_schedule,
                row_stream=row_stream,
                guard=guard,
            )

    def state_without_buffer():
        """
        What a checkpoint holds beside weights and buffer. Taken before each step: if the step must
        not count, this is saved.
        """
        return progress | checkpoint.states(
            hint_schedule=hint_schedule, row_stream=row_stream, guard=guard
        )

    def save(step, state):
        state = state | checkpoint.states(buffer=buffer)
        checkpoint.save(
            out,
            step,
            policy=policy,
            optimizer=optimizer,
            state=state,
            keep_checkpoints=args.keep_checkpoints,
        )

    hint_visits = HintVisits(
        schedule=hint_schedule,
        buffer=buffer,
        clip_cache=clip_cache,
        policy=policy,
        dummy=dummy,
        temperature=args.temperature,
    )
    num_steps = args.steps or -(-len(rows) // args.prompts_per_step)
    log = logs.RunLog(
        out,
        arguments=vars(args),
        step=start_step,
        num_steps=num_steps,
        trackers=args.log,
    )
    run_page = RunPage(out)
    sample_log = SampleLog(out, rows, builder, num_steps)
    processes.print0(
        f"  {len(rows)} rows, {num_steps} steps of {args.prompts_per_step} prompts, from step {start_step}"
    )
    for line in warnings_about_rows(rows, held_out, args.prompts_per_step):
        processes.print0(f"  {line}")
    eval_accuracy = None
    if held_out and start_step == 0:
        progress["before"] = held_out.accuracy()
        processes.print0(f"held-out accuracy before training: {progress['before']:.3f}")

    local = processes.local_slice(args.prompts_per_step)
    row_stream.prefetch_next()
    watch_signals()
    steps = processes.Steps(start_step, num_steps, f"stage {args.stage} {args.algo}")
    for step in steps:
        clock = metrics.Clock()
        save_before = functools.partial(save, step - 1, state_without_buffer())
        step_rows, prompts = row_stream.next_rows(steps)
        prompt_ids = [row["prompt_id"] for row in step_rows]

        # ---- what to replay; a prompt without a stored group gets more fresh completions
        replayed = draw_replayed(buffer, args, step)  # [DRAW]
        num_fresh = [args.num_on + args.num_off - len(group) for group in replayed]  # [SPLIT] [U6]
        row_stream.prefetch_replayed(replayed)
        if step < num_steps:
            row_stream.prefetch_next()  # threads read the next clips while this step computes

        # ---- prompts that stay hard carry their hint
        hinted = set()
        if args.hints:
            prompts, hinted = hint_visits.add_hints(step, step_rows, prompts, steps.tell)  # [HINT]
        clock.lap("data")

        # ---- sample the fresh completions, with the log-probs of the policy that samples them
        seeds = [processes.seed(args.seed, step, i) for i in range(args.prompts_per_step)]
        completions = rollout(
            policy,
            prompts,
            num_fresh[local],
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            eos_ids=builder.eos_ids,
            seeds=seeds[local],
            micro_tokens=args.micro_tokens,
            prompts_at_once=args.rollout_prompts,
        )
        guards.stop_if_broken(step, completions)
        clock.lap("rollout")

        # ---- rewards; from here on every rank has the fresh completions of all ranks
        texts = [builder.texts(group) for group in completions]
        fresh = reward_and_gather(  # [R.stage]
            step_rows[local],
            completions,
            texts,
            step=step,
            hinted=hinted,
            reward_weights=reward_weights,
            judge=judge,
        )
        unjudged_frac = 1 - len(flatten(fresh)) / sum(num_fresh)
        stop_if_unjudged(step, unjudged_frac, judge, save_before)
        clock.lap("reward")

        for update in range(args.updates_per_rollout):  # [U19]
            if update > 0:
                replayed = draw_replayed(buffer, args, step, update)
            # a clip that can no longer be read empties its group and leaves the buffer
            replayed_prompts, replayed = row_stream.read_replayed(replayed, buffer, steps)
            replayed_entries = flatten(replayed)
            replayed_rewards = rewards_of(replayed_entries)

            # ---- advantages: a fresh completion against its group, a replayed one against R̄(q)
            fresh_advantages = [group_advantages(rewards_of(group)) for group in fresh]  # [GRPO.A]
            mean_rewards = torch.tensor([buffer.mean_reward(e.prompt_id) for e in replayed_entries])
            flat_advantages = replay_advantages(replayed_rewards, mean_rewards)  # [VCRS.A]
            replayed_advantages = flat_advantages.split([len(group) for group in replayed])

            # ---- weights in J: the mean over all fresh, alpha times the mean over all replayed
            fresh_weight = 1 / max(len(flatten(fresh)), 1)  # [J.on]
            replayed_weight = args.off_policy_coef / max(len(replayed_entries), 1)  # [J.off]
            fresh_groups = []
            for i, prompt in enumerate(prompts, start=local.start):  # i: place among all P
                fresh_groups.append(
                    WeightedGroup(prompt, fresh[i], fresh_advantages[i], fresh_weight)
                )
            replayed_groups = []
            for i, prompt in replayed_prompts.items():
                replayed_groups.append(
                    WeightedGroup(prompt, replayed[i], replayed_advantages[i], replayed_weight)
                )
            fresh_batches = pack(fresh_groups, args.micro_tokens, dummy)
            replayed_batches = pack(replayed_groups, args.micro_tokens, dummy)

            # ---- log pi_ref, once per completion                                       [U15]
            if args.kl_coef > 0:
                add_ref_logprobs(policy, reference, replayed_batches, replayed, args.temperature)
                add_ref_logprobs(policy, reference, fresh_batches, fresh, args.temperature)

            # ---- the gradient of J: log-probs, [TAS.A], [RATIO], [KL], loss
            infos = add_gradient(
                policy,
                replayed_batches + fresh_batches,
                step,
                temperature=args.temperature,
                tas=tas_settings,
                clip_eps=args.clip_eps,
                kl_coef=args.kl_coef,
                sequence_ratio=args.algo == "avatar-gspo",  # [U22]
            )

            # ---- guard (not in the paper): numbers with which the weights must not move
            info = metrics.gather_infos(infos)
            grad_norm = optim.clip_grad_norm(policy)
            if update == 0:
                first_update = metrics.UpdateRecord(
                    info=info,
                    fresh=fresh,
                    fresh_advantages=fresh_advantages,
                    replayed=replayed,
                    replayed_advantages=replayed_advantages,
                    grad_norm=grad_norm,
                )
            if guard.rejects(
                info,
                grad_norm,
                update=update,
                prompt_ids=prompt_ids,
                steps=steps,
                on_bad_step=args.on_bad_step,
                save_before=save_before,
            ):
                optimizer.zero_grad()
                break

            # ---- the optimizer step
            optim.step(optimizer, args.lr, step, num_steps, cosine=False)
        clock.lap("update")

        # ---- samples for the run's page (not in the paper), with R̄(q) as it was in this step
        sample_log.write(step, buffer, first_update)

        # ---- remember: R̄(q) of unhinted prompts, then all fresh completions
        for group in fresh:
            if group and not group[0].hinted:  # R̄(q) is what the policy earns by itself   [U8]
                buffer.observe(group[0].prompt_id, [e.reward for e in group])  # [R.mean]
        if args.num_off > 0:
            buffer.add(flatten(fresh))  # once: it ranks all prompts seen so far  [ROOM] [TIER]
        progress["num_generated"] += sum(num_fresh)

        # ---- report, and save when it is time to
        step_s = clock.total()
        judge_s, judge_wait_s = judge.end_training_step() if judge else (0.0, 0.0)
        is_eval_step = is_evaluated and (step % args.eval_every == 0 or step == num_steps)
        if is_eval_step:
            eval_accuracy = held_out.accuracy()
        report = {
            "step": step,
            "completions_generated": progress["num_generated"],
            **metrics.step_metrics(first_update, builder.eos_ids),
            **buffer.stats(step),
            **guard.report(),
            **hint_schedule.report(),
            **clock.report(),
            "time/judge_s": judge_s,
            "time/judge_wait_s": judge_wait_s,
            "rewards/unjudged_frac": unjudged_frac,
            "data/bad_rows": len(row_stream.bad_rows),
            "hints/frac": sum(q in hinted for q in prompt_ids) / len(prompt_ids),
            "lr": optimizer.param_groups[0]["lr"],
        }
        report["tokens_per_s"] = report["num_valid_tokens"] / step_s
        if is_eval_step:
            report["eval/acc"] = eval_accuracy
            if progress["before"] is not None:
                report["eval/before"] = progress["before"]
        log.write(report)
        is_save_step = args.save_every > 0 and step % args.save_every == 0
        if is_eval_step or is_save_step:
            run_page.update()
        steps.tell(metrics.step_line(report))
        guard.stop_if_collapsed(report)
        guard.warn_if_idle(report, steps.tell)
        save_now = functools.partial(save, step, state_without_buffer())
        save_and_maybe_stop(step, num_steps, args.save_every, save_now)

    # ---- the end
    save_model(policy, out / "final", builder.processor)
    if progress["before"] is not None and eval_accuracy is not None:
        processes.print0(
            f"held-out accuracy: {progress['before']:.3f} before, {eval_accuracy:.3f} after "
            f"{progress['num_generated']} completions"
        )
    processes.print0(f"saved {out / 'final'}")


if __name__ == "__main__":
    run_main(main, BadRow)
