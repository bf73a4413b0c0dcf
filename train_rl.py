"""
Stages 1-3 of AVATAR (arXiv:2508.03100): GRPO with stratified replay, temporal advantage shaping
and hints. `--algo grpo` is the plain baseline. Where the paper is silent or we differ: README.

    python train_rl.py --stage 2                                          # the toy, on a CPU
    torchrun train_rl.py --stage 2 --model runs/sft/final --data av.jsonl --out runs/stage2    # 1 GPU
    torchrun --nproc-per-node 8 train_rl.py --stage 2 --model runs/sft/final --data av.jsonl ...

A step: draw what to replay (it decides how many fresh completions are needed), roll out, reward,
compare each fresh completion with its group and each replayed one with its prompt's history,
spread the advantages over the tokens, take one gradient step, store the fresh completions.

N completions of a step on this rank, T tokens of the longest, G fresh completions of a prompt.
"""

import argparse
import copy
import itertools
import time

import run  # before torch: it sets how torch's threads wait

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import buffer
import data
import hints
import model
import rewards
import tas
import toy

STD_EPS = 1e-4  # added to a group's std, as TRL does: equal rewards give 0, not 0/0 [U]
SIGMA_FLOOR = 0.1  # least sigma_off: few, nearly equal replayed rewards must not explode [U]
LOG_RATIO_MAX = 20.0  # |log ratio| beyond which exp is not taken [U]
DUAL_CLIP = 3.0  # most a negative advantage counts, in multiples of itself [U]
WINDOW = 20  # on-policy rewards in R̄(q) (authors' script)
EVAL_BATCH = 32  # prompts evaluated together
SAMPLE_EVERY = 10  # steps between entries of samples.jsonl

STAGES = {  # what a stage is; a typed flag wins
    1: dict(reward_weights="format=.5,acc=.5"),  # paper, supplement: general visual reasoning
    2: dict(reward_weights="format=.2,acc=.4,self=.4", audio_captions=True),  # paper: audio-visual alignment
    3: dict(reward_weights="format=.5,judge=.5"),  # paper: format + judge; the weights are ours [U]
}
GRPO = dict(num_on=8, num_off=0, tas_shape="uniform", hints=False)  # paper: 8 fresh, nothing else


def parse_args(argv=None):
    formatter = type("F", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    boolean = argparse.BooleanOptionalAction
    run.add_flags(parser, out=None)
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2, help="1 visual, 2 audio-visual, 3 localisation")
    parser.add_argument("--algo", choices=["avatar", "grpo"], default="avatar", help="grpo: 8 fresh, no replay, no TAS, no hints")
    data.add_flags(parser)
    parser.add_argument("--audio-captions", action=boolean, default=False, help="put a row's audio_caption into its prompt [U]")
    parser.add_argument("--eval-data", help="held-out JSONL (default: the toy's test split)")
    # rollout
    parser.add_argument("--prompts-per-step", type=int, default=8, help="fresh prompts a step, over all ranks [U]")
    parser.add_argument("--num-on", type=int, default=4, help="fresh completions a prompt (paper: 4)")
    parser.add_argument("--num-off", type=int, default=4, help="replayed completions a prompt (paper: 4); 0 = no replay")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling and of all log-probs (authors' script)")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="tokens a completion may have (authors' script)")
    # objective
    parser.add_argument("--reward-weights", default="format=.5,acc=.5", help="parts of the reward: format, acc, self, judge [R.stage]")
    parser.add_argument("--judge", choices=["toy"], help="who scores the reasoning steps of stage 3 [R.judge]")
    parser.add_argument("--clip-eps", type=float, default=0.2, help="ratio clip, both sides (authors' script)")
    parser.add_argument("--kl-coef", type=float, default=0.1, help="beta of the KL to the start policy (paper); 0 = no reference [KL]")
    parser.add_argument("--off-policy-coef", type=float, default=0.6, help="alpha (paper) [J]")
    parser.add_argument("--tas-shape", choices=tas.SHAPES, default="parabolic", help="weight over a completion's tokens [TAS.w]")
    parser.add_argument("--tas-lambda", type=float, default=0.3, help="how much the ends count more (paper) [TAS.w]")
    parser.add_argument("--tas-equal-mean", action=boolean, default=False, help="control: weights rescaled to mean 1 [TAS.w]")
    # replay and hints
    parser.add_argument("--buffer-size", type=int, default=10000, help="completions (paper: 10 000)")
    parser.add_argument("--hints", action=boolean, default=True, help="hints for prompts that stay Hard [HINT]")
    parser.add_argument("--hint-patience", type=int, default=3, help="visits in Hard before a hint [U]")
    parser.add_argument("--hint-kl", type=float, default=0.02, help="nats/token to the behaviour policy, below which it is stuck [U]")
    # optimisation
    parser.add_argument("--lr", type=float, default=5e-7, help="peak learning rate (authors' script)")
    parser.add_argument("--warmup-frac", type=float, default=0.05, help="share of the steps with rising lr (authors' script)")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="AdamW [U]")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping [U]")
    parser.add_argument("--micro-tokens", type=int, default=16384, help="prompt and completion tokens read at one time")
    parser.add_argument("--lora-rank", type=int, default=16, help="0 = full fine-tuning (paper: 16)")
    parser.add_argument("--train-towers", action=boolean, default=False, help="train the vision and audio towers too")
    parser.add_argument("--gradient-checkpointing", action=boolean, default=False, help="less memory, a third more time")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between held-out evaluations; 0 = none at all")
    parser.add_argument("--eval-samples", type=int, default=256, help="completions of a held-out evaluation, at --temperature")

    def overrides(first):
        yield f"stage {first.stage}", STAGES[first.stage] | dict(out=f"runs/stage{first.stage}", steps=400)  # paper, Fig. 5
        if first.algo == "grpo":
            yield "grpo", GRPO
        if first.model is None or toy.is_toy(first.model):
            yield "toy", toy.OVERRIDES["media"] | toy.OVERRIDES["rl"]
        if first.data is None:
            yield "toy", dict(judge="toy")

    args, source = run.parse(parser, argv, overrides)
    weights = {k: float(v) for k, v in (part.split("=") for part in args.reward_weights.split(","))}
    if unknown := set(weights) - {"format", "acc", "self", "judge"}:
        raise run.UserError(f"--reward-weights: no part called {', '.join(unknown)}")
    if "judge" in weights and not args.judge:
        raise run.UserError("the judge part of the reward needs --judge")
    return args, source, weights


# ---- advantages and loss -----------------------------------------------------------------------


def group_advantages(group_rewards):
    """
    A_i = (R_i - mean(R)) / (std(R) + eps)                                            [GRPO.A]
    A fresh completion against the others of its prompt.

    group_rewards  (G,) float     of one prompt's fresh completions
    returns        (G,) float     0 for a group of one, or of equal rewards
    """
    assert group_rewards.ndim == 1, f"one group (G,), got {tuple(group_rewards.shape)}"
    if len(group_rewards) < 2:
        return torch.zeros_like(group_rewards)
    return (group_rewards - group_rewards.mean()) / (group_rewards.std() + STD_EPS)


def replay_advantages(replayed_rewards, mean_rewards):
    """
    A_i = (R_i - R̄(q_i)) / sigma_off,   sigma_off = std of the step's replayed rewards  [VCRS.A]
    A replayed completion against what its prompt now usually earns.

    replayed_rewards  (M,) float     all that are replayed in the step, on all ranks
    mean_rewards      (M,) float     R̄(q_i): mean of the prompt's last 20 on-policy rewards
    returns           (M,) float

    sigma_off is taken over the step, not the prompt or the micro-batch: over one sample it is 0.
    """
    assert replayed_rewards.shape == mean_rewards.shape and replayed_rewards.ndim == 1
    sigma = replayed_rewards.std() if len(replayed_rewards) > 1 else torch.tensor(0.0)
    return (replayed_rewards - mean_rewards) / sigma.clamp(min=SIGMA_FLOOR)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, token_advantages, completion_mask, weights, clip_eps, kl_coef):
    """
    J = sum_i weight_i mean_t [ min(r A, clip(r, 1-eps, 1+eps) A) - beta KL ]            [J]
    r_t = pi(c_t) / b(c_t), b the policy that sampled the completion                     [RATIO]
    KL_t = exp(d) - d - 1,  d = log pi_ref(c_t) - log pi(c_t)   (k3, never negative)     [KL]

    logprobs          (N, T) float   present policy pi, with gradient
    old_logprobs      (N, T) float   behaviour policy b, as recorded when it sampled
    ref_logprobs      (N, T) float   frozen reference, or None for no KL
    token_advantages  (N, T) float   A_{i,t}, after TAS
    completion_mask   (N, T) bool    1 up to and including EOS: ending is an action too
    weights           (N,) float     1 / (fresh completions of the step on all ranks) [J.on], or
                                     alpha / (replayed ones) [J.off]: no split changes the sum
    returns           loss (), -J; info: dict of (N,) float without gradient

    On fresh completions r is 1, so the loss is about -mean(A) = 0 at first; its gradient is not.
    Before any update b = pi for them; for replayed ones r is a true importance ratio. A negative A
    with a huge r would pull without bound: it counts at most DUAL_CLIP A.
    """
    assert logprobs.shape == old_logprobs.shape == token_advantages.shape == completion_mask.shape
    assert weights.shape == logprobs.shape[:1]
    mask, num_tokens = completion_mask.float(), completion_mask.sum(1).clamp(min=1)
    log_ratio = ((logprobs - old_logprobs) * mask).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)  # (N, T)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.min(ratio * token_advantages, clipped * token_advantages)
    surrogate = torch.where(token_advantages < 0, torch.max(surrogate, DUAL_CLIP * token_advantages), surrogate)
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        d = ((ref_logprobs - logprobs) * mask).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
        kl = d.exp() - d - 1
    objective = ((surrogate - kl_coef * kl) * mask).sum(1) / num_tokens  # (N,) per sequence
    with torch.no_grad():
        outside = torch.where(token_advantages > 0, ratio > 1 + clip_eps, (ratio < 1 - clip_eps) & (token_advantages < 0))
        info = dict(
            kl=(kl * mask).sum(1) / num_tokens,
            clip_frac=(outside * mask).sum(1) / num_tokens,
            ratio_max=(ratio * mask).amax(1),
            log_ratio=log_ratio.sum(1),  # of the whole completion
            gap=log_ratio.abs().amax(1),
        )
    return -(weights * objective).sum(), info


# ---- rewards -----------------------------------------------------------------------------------


def reward_completions(row, texts, mean_logprobs, weights, judge):
    """
    One prompt's fresh completions -> list of (R, {part: value}).

    judge   callable(row, steps) -> step scores, asked only if its part counts
    """
    options, kind = row.get("options"), row["answer_type"]
    thinks, answers = zip(*map(rewards.split_completion, texts))
    voted = rewards.self_consistency_rewards(answers, mean_logprobs, kind, options)
    scored = []
    for text, think, answer, self_reward in zip(texts, thinks, answers, voted):
        parts = dict(format=rewards.format_reward(text), acc=rewards.accuracy_reward(answer, row["answer"], kind, options))
        parts["self"] = self_reward
        if "judge" in weights:
            steps = rewards.reasoning_steps(think)
            parts["judge"] = rewards.judge_reward(judge(row, steps)) if steps else 0.0  # nothing to judge
        scored.append((rewards.combine_rewards(parts, weights), parts))
    return scored


# ---- the run -----------------------------------------------------------------------------------


def main():
    args, source, reward_weights = parse_args()
    rank, world_size, device = run.init_processes(args.device)
    is_main = rank == 0
    out = run.open_folder(args, source, is_main)
    if args.prompts_per_step % world_size:
        raise run.UserError(f"--prompts-per-step {args.prompts_per_step} must be a multiple of the {world_size} processes")

    # ---- data, policy, reference
    if is_main and not (args.model and args.data):
        toy.ensure(args.stage)
    if dist.is_initialized():
        dist.barrier()
    toy_folder = toy.HERE / "toy"
    rows = data.Rows(args.data or toy_folder / f"stage{args.stage}" / "train.jsonl")
    held_out = args.eval_data or (None if args.data else toy_folder / f"stage{args.stage}" / "test.jsonl")
    held_out = data.Rows(held_out) if held_out and args.eval_every else None
    folder = str(args.model or toy_folder / "model")
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    policy = model.load(folder, args.lora_rank, args.train_towers, args.gradient_checkpointing)
    reference = None
    if args.kl_coef and not args.lora_rank:  # LoRA: the reference is the policy without its adapter
        reference = run.place(copy.deepcopy(policy).requires_grad_(False), device, dtype)
    policy = run.place(policy, device, dtype)
    build = model.InputBuilder(folder, data.recipe_from(args), rows.path.parent, args.audio_captions)
    reader = data.Reader(build, args.workers, int(args.cache_gb * 1e9))
    eval_reader = held_out and data.Reader(build.at(held_out.path.parent), args.workers, int(args.cache_gb * 1e9))
    judge = toy.judge if args.judge == "toy" else None

    # ---- state
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=args.lr, weight_decay=args.weight_decay)  # fmt: skip
    replay = buffer.ReplayBuffer(args.buffer_size, WINDOW)
    schedule = hints.HintSchedule(args.hint_patience, args.hint_kl)
    steps = args.steps or -(-len(rows) // args.prompts_per_step)
    warmup = max(1, round(args.warmup_frac * steps))
    start = num_generated = 0
    if args.resume and (state := run.load_checkpoint(out, policy, optimizer)):
        start, num_generated = state["step"], state["num_generated"]
        replay.load_state_dict(state["buffer"])
        schedule.load_state_dict(state["hints"])
    if is_main:
        run.cut_log(out / "metrics.jsonl", start)
        run.cut_log(out / "samples.jsonl", start)
        print(f"  {len(rows)} rows, {steps} steps of {args.prompts_per_step} prompts, from step {start}")

    def load_prompt(row, hint, reader=reader):
        """A prompt's inputs; with frozen towers their outputs, which never change."""
        prompt = reader.get(row, hint)
        if not args.train_towers and any(isinstance(m, dict) for m in prompt.media.values()):
            with torch.no_grad():
                prompt = prompt._replace(media=policy.encode([prompt])[0])
            reader.put(row, hint, prompt)
        return prompt

    def hint_of(row):
        return row.get("hint") if args.hints and not hints.hint_leak(row.get("hint") or "", row["answer"], row["answer_type"], row.get("options")) else None  # fmt: skip

    def evaluate():
        if not held_out:
            return None
        load = lambda row: load_prompt(row, None, eval_reader)  # noqa: E731
        return held_out_accuracy(policy, load, held_out, build, args, rank, world_size)

    # ---- loop
    first_accuracy = accuracy = evaluate() if start == 0 else None
    if is_main and accuracy is not None:
        print(f"held-out accuracy before training: {accuracy:.3f}")
    order = data.shuffled(len(rows), args.seed, skip=start * args.prompts_per_step)
    mine = slice(rank * args.prompts_per_step // world_size, (rank + 1) * args.prompts_per_step // world_size)
    step_rows = [rows[i] for i in itertools.islice(order, args.prompts_per_step)]
    bar = tqdm(total=steps, initial=start, desc=f"stage {args.stage} {args.algo}", disable=None if is_main else True)
    for step in range(start + 1, steps + 1):
        began = time.perf_counter()
        rng = np.random.default_rng([args.seed, step])  # the same on every rank

        # what to replay; prompts without a replayed partner get fresh completions instead
        drawn = replay.draw(args.prompts_per_step, args.num_off, step, rng) if args.num_off else []
        partners = drawn + [None] * (args.prompts_per_step - len(drawn))

        # which prompts carry a hint now
        events, my_rows = [], step_rows[mine]
        if args.hints:
            kls = {}
            for row in my_rows:
                stored = [e for e in replay.entries_of(row["prompt_id"], step) if not e.hinted][-8:]
                if hint_of(row) and stored and schedule.needs_kl(row["prompt_id"], replay.tier(row["prompt_id"])):
                    kls[row["prompt_id"]] = stored_kl(policy, load_prompt(row, None), stored, args.temperature)
            kls = {k: v for part in run.gather(kls) for k, v in part.items()}
            for row in step_rows:
                prompt_id = row["prompt_id"]
                if event := schedule.observe(prompt_id, replay.tier(prompt_id), kls.get(prompt_id)):
                    events.append((event, prompt_id))
        hint = {r["prompt_id"]: hint_of(r) if args.hints and schedule.due(r["prompt_id"]) else None for r in step_rows}

        # ---- roll out
        prompts = [load_prompt(row, hint[row["prompt_id"]]) for row in my_rows]
        data_s = time.perf_counter() - began
        num_fresh = [args.num_on + (0 if partner else args.num_off) for partner in partners[mine]]
        seeds = [hash_seed(args.seed, step, i) for i in range(args.prompts_per_step)][mine]
        fresh = model.rollout(policy, prompts, num_fresh, args.temperature, args.max_new_tokens, build.eos_ids, seeds)
        next_rows = [rows[i] for i in itertools.islice(order, args.prompts_per_step)]
        for row in next_rows[mine]:
            reader.prefetch(row)
        rollout_s = time.perf_counter() - began - data_s

        # ---- reward; every rank learns what every rank made
        made, unjudged = [], 0
        for row, group in zip(my_rows, fresh):
            texts = [build.tokenizer.decode(c.ids, skip_special_tokens=True) for c in group]
            likelihoods = [c.logprobs.mean().item() for c in group]
            scored = reward_completions(row, texts, likelihoods, reward_weights, judge)
            about = (row["prompt_id"], hint[row["prompt_id"]] is not None)
            # what the judge could not judge has no reward: it leaves the group, it does not count as 0
            made.append([(*about, *score, c) for score, c in zip(scored, group) if score[0] is not None])
            unjudged += len(group) - len(made[-1])
        gathered = run.gather((made, unjudged))
        all_made, unjudged = [g for part, _ in gathered for g in part], sum(n for _, n in gathered)

        # ---- advantages
        fresh_advantages = [group_advantages(torch.tensor([reward for _, _, reward, _, _ in group])) for group in all_made]
        replayed = [entry for group in drawn for entry in group]
        off_advantages = replay_advantages(
            torch.tensor([e.reward for e in replayed]), torch.tensor([replay.mean_reward(e.prompt_id) for e in replayed])
        ).split([len(g) for g in drawn])  # fmt: skip
        num_on, num_off = sum(map(len, all_made)), len(replayed)
        items = {}  # (prompt_id, hinted) -> its completions in this rank's update: one prompt, read once
        for i in range(mine.start, mine.stop):
            for (prompt_id, hinted, _, _, c), advantage in zip(all_made[i], fresh_advantages[i]):
                items.setdefault((prompt_id, hinted), []).append((c.ids, c.logprobs, advantage, 1 / num_on, True))
            for e, advantage in zip(partners[i] or (), off_advantages[i] if partners[i] else ()):
                items.setdefault((e.prompt_id, e.hinted), []).append(
                    (e.completion_ids.long(), e.old_logprobs, advantage, args.off_policy_coef / num_off, False)
                )

        # ---- update
        began_update = time.perf_counter()
        groups = [(load_prompt(r := rows[rows.index(q)], r.get("hint") if hinted else None), list(zip(*cs))) for (q, hinted), cs in items.items()]  # fmt: skip
        info = update(policy, reference, groups, args, device)
        grad_norm = run.clip_grad_norm(policy, args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * run.lr_scale(step, steps, warmup, cosine=False)
        optimizer.step()
        optimizer.zero_grad()
        update_s = time.perf_counter() - began_update

        # ---- remember
        for group in filter(None, all_made):
            prompt_id, hinted = group[0][:2]
            if not hinted:  # R̄(q) is what the policy earns by itself
                replay.observe(prompt_id, [reward for _, _, reward, _, _ in group])
            if args.num_off:
                replay.add([buffer.Entry(prompt_id, c.ids, c.logprobs, r, parts, step, hinted) for _, _, r, parts, c in group])
        num_generated += num_on + unjudged

        # ---- report
        info = {k: torch.cat([part[k] for part in run.gather(info)]) for k in info}
        if args.eval_every and (step % args.eval_every == 0 or step == steps):
            accuracy = evaluate()
        if is_main:
            metrics = dict(step=step, completions_generated=num_generated)
            metrics |= step_metrics(info, all_made, fresh_advantages, off_advantages)
            metrics |= {
                "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **replay.stats(step),
                "hints/frac": sum(h is not None for h in hint.values()) / len(hint),
                "rewards/unjudged_frac": unjudged / (num_on + unjudged), "hints/entered": schedule.entered, "hints/withdrawn": schedule.withdrawn,
                "tokens_per_s": metrics["num_valid_tokens"] / (time.perf_counter() - began),
                "time/data_s": data_s, "time/rollout_s": rollout_s, "time/update_s": update_s,
            }  # fmt: skip
            if args.eval_every and (step % args.eval_every == 0 or step == steps) and accuracy is not None:
                metrics["eval/acc"] = accuracy
            run.log(out / "metrics.jsonl", metrics)
            if step % SAMPLE_EVERY == 0 or step == 1:
                log_samples(out, step, all_made[0], fresh_advantages[0], replay, build.tokenizer)
            for event, prompt_id in events:
                bar.write(f"step {step}: hint {event}: {prompt_id}")
            bar.update()
            bar.write(step_line(step, steps, metrics))
        if args.save_every and step % args.save_every == 0:
            state = dict(num_generated=num_generated, buffer=replay.state_dict(), hints=schedule.state_dict())
            run.save_checkpoint(out, step, policy, optimizer, state, args.keep, is_main)
        step_rows = next_rows
    bar.close()
    model.save(policy, out / "final", build.processor, is_main)
    if is_main:
        if accuracy is not None and first_accuracy is not None:
            print(f"held-out accuracy: {first_accuracy:.3f} before, {accuracy:.3f} after ({num_generated} completions generated)")
        print(f"saved {out / 'final'}")


def hash_seed(*numbers):
    """A 63-bit seed that depends on every number."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def stored_kl(policy, prompt, entries, temperature):
    """KL of the present policy to the one that sampled the stored completions, nats/token [HINT.KL]."""
    with torch.no_grad():
        logprobs, mask, _ = model.completion_logprobs(policy, [prompt], [[e.completion_ids.long() for e in entries]], temperature)
    old = pad_sequence([e.old_logprobs for e in entries], batch_first=True).to(logprobs)
    return hints.behavior_kl(logprobs, old, mask)


def update(policy, reference, groups, args, device):
    """
    Adds the step's gradient over micro-batches of whole groups.

    groups   list of (Prompt, columns): ids, old_logprobs, advantage, weight, fresh of its completions
    returns  dict of (N,) tensors, one number a completion
    """
    sizes = [len(p.input_ids) + sum(map(len, columns[0])) for p, columns in groups]
    packs = model.micro_batches(sizes, args.micro_tokens)
    num_packs = max(run.gather(len(packs)))  # every rank the same number, or FSDP would wait for ever
    infos = []
    for k in range(num_packs):
        part = [groups[i] for i in packs[min(k, len(packs) - 1)]]
        prompts, ids = [p for p, _ in part], [columns[0] for _, columns in part]
        old, advantages, weights, fresh = (sum((list(columns[j]) for _, columns in part), []) for j in range(1, 5))
        advantages, weights = torch.tensor(advantages, device=device), torch.tensor(weights, device=device)
        logprobs, mask, entropy = model.completion_logprobs(policy, prompts, ids, args.temperature)
        old_logprobs = pad_sequence(old, batch_first=True).to(logprobs)
        ref_logprobs = None
        if args.kl_coef:
            with torch.no_grad(), policy.reference():
                ref_logprobs = model.completion_logprobs(reference or policy, prompts, ids, args.temperature)[0]
        token_advantages = tas.shape_advantages(advantages, mask, args.tas_shape, args.tas_lambda, args.tas_equal_mean)
        repeat = float(k < len(packs))
        loss, info = grpo_loss(
            logprobs, old_logprobs, ref_logprobs, token_advantages, mask, weights * repeat, args.clip_eps, args.kl_coef
        )
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        (loss * world_size).backward()  # FSDP averages over ranks; the weights already sum over them
        if repeat:
            lengths = mask.sum(1)
            info |= dict(
                loss=torch.full((len(ids_flat := sum(map(list, ids), [])),), loss.item() / len(ids_flat)),
                entropy=(entropy * mask).sum(1) / lengths, length=lengths.float(), fresh=torch.tensor(fresh),
                tas_weight=(tas.tas_weights(mask, args.tas_shape, args.tas_lambda, args.tas_equal_mean)).sum(1) / lengths,
            )  # fmt: skip
            infos.append({k: v.cpu() for k, v in info.items()})
    return {k: torch.cat([info[k] for info in infos]) for k in infos[0]}


def step_metrics(info, all_made, fresh_advantages, off_advantages):
    """The step's numbers (README, "Metrics"), each once over all completions of all ranks."""
    fresh, made = info["fresh"], [item for group in all_made for item in group]
    step_rewards = torch.tensor([reward for _, _, reward, _, _ in made])
    advantages = torch.cat([*fresh_advantages, *off_advantages])
    off = ~fresh
    ratio = info["log_ratio"][off].exp() if off.any() else torch.ones(1)  # nothing replayed: neutral
    return {
        "loss": info["loss"].sum().item(),
        "reward": step_rewards.mean().item(),
        "reward_std": step_rewards.std().item(),
        **{f"rewards/{k}": sum(parts[k] for _, _, _, parts, _ in made) / len(made) for k in made[0][3]},
        "frac_reward_zero_std": sum(len({r for _, _, r, _, _ in g}) <= 1 for g in all_made) / len(all_made),
        "advantage_std": advantages.std().item(),
        "advantage_zero_frac": (advantages == 0).float().mean().item(),
        "kl": info["kl"].mean().item(),
        "entropy": info["entropy"][fresh].mean().item(),
        "clip_frac": info["clip_frac"].mean().item(),
        "off/ratio_mean": ratio.mean().item(),
        "off/ratio_max": info["ratio_max"][off].max().item() if off.any() else 1.0,
        "off/clip_frac": info["clip_frac"][off].mean().item() if off.any() else 0.0,
        "off/ess_frac": (ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)).item(),
        "logprob_gap": info["gap"][fresh].max().item(),
        "tas/weight_mean": info["tas_weight"].mean().item(),
        "completions/mean_length": sum(len(c.ids) for *_, c in made) / len(made),
        "completions/clipped_ratio": sum(c.truncated for *_, c in made) / len(made),
        "num_valid_tokens": int(info["length"].sum()),
    }


def step_line(step, steps, m):
    line = (
        f"step {step:4d}/{steps}  reward {m['reward']:.3f}  acc {m['rewards/acc']:.3f}  kl {m['kl']:.4f}  "
        f"zero-std {m['frac_reward_zero_std']:.2f}  grad {m['grad_norm']:.2f}  len {m['completions/mean_length']:.0f}  "
        f"buffer {m['buffer/size']}  made {m['completions_generated']}  "
        f"{m['time/rollout_s'] + m['time/update_s'] + m['time/data_s']:.1f} s"
    )
    return line + (f"  held-out {m['eval/acc']:.3f}" if "eval/acc" in m else "")


def log_samples(out, step, group, advantages, replay, tokenizer):
    for (prompt_id, hinted, reward, parts, c), advantage in zip(group, advantages.tolist()):
        run.log(out / "samples.jsonl", dict(
            step=step, prompt_id=prompt_id, completion=tokenizer.decode(c.ids), reward=reward, reward_parts=parts,
            advantage=advantage, tier=replay.tier(prompt_id), hinted=hinted,
        ))  # fmt: skip


def held_out_accuracy(policy, load, rows, build, args, rank, world_size):
    """Share of right answers among --eval-samples completions on held-out rows, sampled as in training."""
    per_row = max(1, round(args.eval_samples / len(rows)))
    mine, scores = range(len(rows))[: args.eval_samples][rank::world_size], []
    for first in range(0, len(mine), EVAL_BATCH):
        chosen = mine[first : first + EVAL_BATCH]
        batch = [rows[i] for i in chosen]
        seeds = [hash_seed(0, 0, i) for i in chosen]
        prompts = [load(row) for row in batch]
        groups = model.rollout(policy, prompts, [per_row] * len(batch), args.temperature, args.max_new_tokens, build.eos_ids, seeds)
        for row, group in zip(batch, groups):
            for c in group:
                answer = rewards.parse_answer(build.tokenizer.decode(c.ids, skip_special_tokens=True))
                right = rewards.accuracy_reward(answer, row["answer"], row["answer_type"], row.get("options")) == 1
                scores.append(float(right))  # no partial credit here
    scores = [s for part in run.gather(scores) for s in part]
    return sum(scores) / len(scores)


if __name__ == "__main__":
    run.main_guard(main)
