"""
What a step of RL reports: every metric with its formula, and the printed line.

Names follow TRL where TRL has the quantity. Each number is computed once, over all completions of
the step on all ranks: no mean of means.
"""

import math
import time
from statistics import fmean as mean
from typing import NamedTuple

import torch

from data.rows import stable_hash
from run.processes import all_gather_object

METRICS = {  # name -> formula or meaning; docs/metrics.md's table is this one
    "step": "steps so far: rollouts, each with --updates-per-rollout optimizer steps",
    "completions_generated": "fresh completions so far, also hinted ones, unjudged ones, and more where too little is stored [U6]",
    "loss": "-J, see [J]",
    "reward": "mean of R over fresh completions, R = sum_k w_k r_k [R.stage]",
    "reward_std": "std of R over fresh completions",
    "rewards/format": "mean of r_format, -1 or 1 [R.format]",
    "rewards/acc": "mean of r_acc in 0..1, whatever its weight [R.acc]",
    "rewards/self": "mean of r_self, 0 or 1 [R.self]",
    "rewards/judge": "mean of r_judge in 0..1, if the judge has a weight [R.judge]",
    "rewards/unjudged_frac": "share of fresh completions without a judgement: not trained on, not stored",
    "frac_reward_zero_std": "share of fresh groups with all R equal: the vanishing advantage [GRPO.A]",
    "advantage_std": "std of A over fresh and replayed completions",
    "advantage_zero_frac": "share of fresh and replayed completions with A = 0 exactly",
    "advantage_hist": "completions by A, 60 bins of 0.1 from -3 to 3, the ends open; those with A = 0 are in no bin",
    "kl": "mean over completions of mean_t KL_t, an estimate of KL(pi ‖ ref), nats [KL]",
    "entropy": "mean over the update's fresh completions (if none: replayed) of mean_t entropy, nats",
    "clip_frac": "mean over completions of the share of tokens whose gradient is cut",
    "logprob_gap": "max over fresh tokens of abs(log-prob in the rollout - recomputed), nats; null: none",
    "moved": "mean over fresh tokens of abs(log pi - log ref), nats; 0 without a reference",
    "moved_by_rounding": "mean over fresh tokens of abs(log-prob in the rollout - recomputed), nats",
    "off/ratio_mean": "mean over replayed completions of prod_t r_t; 1 without replay [RATIO]",
    "off/ratio_max": "max over replayed tokens of r_t; 1 without replay",
    "off/clip_frac": "clip_frac over replayed completions",
    "off/ess_frac": "(sum w)^2 / (n sum w^2), w = min(r, 3) of the n replayed tokens; 1 = all alike",
    "off/age_mean": "mean of step - birth step over replayed completions; 0 without replay",
    "tas/weight_mean": "mean over completions of mean_t w_t; about 1 + lambda / 3 [TAS.w]",
    "completions/mean_length": "tokens of a fresh completion, EOS included",
    "completions/clipped_ratio": "share of fresh completions cut off by --max-new-tokens",
    "num_valid_tokens": "completion tokens in the update, fresh and replayed",
    "grad_norm": "L2 norm of the gradient before clipping",
    "lr": "learning rate of the step",
    "buffer/size": "completions stored",
    "buffer/prompts": "prompts with stored completions",
    "buffer/frac_easy": "share of the stored completions whose prompt is Easy now [TIER]",
    "buffer/frac_medium": "same, Medium",
    "buffer/frac_hard": "same, Hard",
    "buffer/staleness_mean": "mean of step - birth step over stored completions",
    "buffer/mean_reward": "mean of R̄(q) over prompts seen [R.mean]",
    "hints/frac": "share of the step's prompts that carried their hint [HINT]",
    "hints/entered": "hints that entered so far",
    "hints/withdrawn": "hints withdrawn so far",
    "tokens_per_s": "num_valid_tokens / seconds of the whole step",
    "steps_skipped": "steps so far without an update, as their numbers were bad (--on-bad-step skip)",
    "data/bad_rows": "rows so far that could not be used, each replaced by the next one",
    "time/data_s": "seconds before the rollout: waiting for clips, encoding new ones, hints",
    "time/rollout_s": "seconds of sampling",
    "time/update_s": "seconds of log-probs, backward passes and the optimizer",
    "time/judge_s": "seconds from the first question to the judge to its last answer; rank 0",
    "time/judge_wait_s": "the part of time/judge_s in which the loop had to wait",
    "eval/acc": "share of right answers on held-out rows, at --temperature",
    "eval/before": "the same before the first step",
}


class UpdateRecord(NamedTuple):
    """The first update of a step: what the step reports. Lists hold P groups, of all ranks."""

    info: dict  # of gather_infos
    fresh: list  # of lists of Entry
    fresh_advantages: list  # of (G,) tensors, of the fresh ones
    replayed: list  # of lists of Entry
    replayed_advantages: list  # of (M,) tensors, of the replayed ones
    grad_norm: float


def completion_info(info, micro_batch, step, *, logprobs, entropy, completion_mask, tas_weights):
    """
    Adds to grpo_loss's info what else is reported of each completion of a micro-batch.

    info      dict of (N,) tensors, of grpo_loss
    returns   dict of (N,) tensors on the CPU, and of lists of N: prompt_id, ids_hash of its tokens, and
              each completion's tas_weights and token_log_ratios, a number per token
    """
    lengths = completion_mask.sum(1)
    entries = micro_batch.entries
    age = torch.tensor([step - entry.born_step for entry in entries])
    info = info | dict(
        entropy=(entropy * completion_mask).sum(1) / lengths,
        tas_weight_mean=tas_weights.sum(1) / lengths,
        age=age,
        fresh=age == 0,
    )
    info = {name: value.cpu() for name, value in info.items()}
    token_log_ratios = logprobs.detach() - micro_batch.padded("old_logprobs", like=logprobs)
    info["prompt_id"] = [entry.prompt_id for entry in entries]
    info["ids_hash"] = [ids_hash(entry) for entry in entries]
    info["tas_weights"] = unpadded(tas_weights, lengths)
    info["token_log_ratios"] = unpadded(token_log_ratios, lengths)
    return info


def ids_hash(entry):
    """A number that tells the completions of a prompt apart, on every rank the same."""
    return stable_hash(entry.completion_ids.numpy().tobytes())


def unpadded(rows, lengths):
    """(N, T), (N,) -> list of N lists of numbers."""
    return [row[:length] for row, length in zip(rows.tolist(), lengths.tolist())]


def gather_infos(infos):
    """This rank's infos of all its micro-batches -> one info of all ranks' completions."""
    gathered = [info for part in all_gather_object(infos) for info in part]
    joined = {}
    for name in gathered[0]:
        values = [info[name] for info in gathered]
        if torch.is_tensor(values[0]):
            joined[name] = torch.cat(values)
        else:
            joined[name] = [item for value in values for item in value]
    return joined


def step_metrics(update, eos_ids):
    """
    update    UpdateRecord
    returns   dict: the part of METRICS that comes from the completions
    """
    info = update.info
    fresh = info["fresh"]
    off = ~fresh
    entries = [entry for group in update.fresh for entry in group]
    rewards = torch.tensor([entry.reward for entry in entries])
    advantages = torch.cat([*update.fresh_advantages, *update.replayed_advantages])
    part_names = entries[0].reward_parts
    part_means = {f"rewards/{p}": mean(e.reward_parts[p] for e in entries) for p in part_names}
    report = {
        "loss": info["loss"].sum().item(),
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        **part_means,
        "frac_reward_zero_std": mean(len({e.reward for e in g}) <= 1 for g in update.fresh if g),
        "advantage_std": advantages.std().item(),
        "advantage_zero_frac": (advantages == 0).float().mean().item(),
        "advantage_hist": histogram(advantages),
        "kl": info["kl"].mean().item(),
        "entropy": info["entropy"][fresh if fresh.any() else off].mean().item(),
        "clip_frac": info["clip_frac"].mean().item(),
        "logprob_gap": info["logprob_gap_max"][fresh].max().item() if fresh.any() else math.nan,
        "moved": mean_over_tokens("moved", info, fresh),
        "moved_by_rounding": mean_over_tokens("logprob_gap_mean", info, fresh),
        "off/ratio_mean": 1.0,
        "off/ratio_max": 1.0,
        "off/clip_frac": 0.0,
        "off/ess_frac": 1.0,
        "off/age_mean": 0.0,
        "tas/weight_mean": info["tas_weight_mean"].mean().item(),
        "completions/mean_length": mean(len(e.completion_ids) for e in entries),
        "completions/clipped_ratio": mean(
            int(e.completion_ids[-1]) not in eos_ids for e in entries
        ),
        "num_valid_tokens": int(info["num_tokens"].sum()),
        "grad_norm": update.grad_norm,
    }
    if off.any():
        ratio_sum = info["ratio_sum"][off].sum()
        ratio_square_sum = info["ratio_square_sum"][off].sum()
        num_tokens = info["num_tokens"][off].sum()
        completion_ratios = info["log_ratio"][off].clamp(max=20).exp()  # of whole completions
        report |= {
            "off/ratio_mean": completion_ratios.mean().item(),
            "off/ratio_max": info["ratio_max"][off].max().item(),
            "off/clip_frac": info["clip_frac"][off].mean().item(),
            "off/ess_frac": (ratio_sum**2 / (num_tokens * ratio_square_sum)).item(),
            "off/age_mean": info["age"][off].float().mean().item(),
        }
    return report


def mean_over_tokens(name, info, chosen):
    """Mean over the tokens of the chosen completions of a mean over each one's tokens; 0 without any."""
    num_tokens = info["num_tokens"][chosen]
    total = (info[name][chosen] * num_tokens).sum()
    return (total / num_tokens.sum().clamp(min=1)).item()


def histogram(advantages):
    """advantages (N,) -> 60 counts, see METRICS: exact zeros are counted apart, as a share."""
    bins = torch.histc(advantages[advantages != 0].float().clamp(-3, 3), bins=60, min=-3, max=3)
    return bins.int().tolist()


class Clock:
    """Where the seconds of a step go. A lap belongs to the part that is named at its end."""

    def __init__(self):
        self.began = self.last = time.perf_counter()
        self.seconds = {}

    def lap(self, part):
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def total(self):
        return time.perf_counter() - self.began

    def report(self):
        """Metrics: seconds of data, rollout and update."""
        return {f"time/{part}_s": self.seconds[part] for part in ("data", "rollout", "update")}


def step_line(m):
    """The line printed for a step."""
    parts = ("data", "rollout", "update", "judge_wait")
    seconds = sum(m[f"time/{part}_s"] for part in parts)
    line = (
        f"reward {m['reward']:.3f}  acc {m['rewards/acc']:.3f}  kl {m['kl']:.4f}  "
        f"zero-std {m['frac_reward_zero_std']:.2f}  grad {m['grad_norm']:.2f}  "
        f"len {m['completions/mean_length']:.0f}  buffer {m['buffer/size']}  "
        f"completions {m['completions_generated']}  {seconds:.1f} s"
    )
    if m["completions/clipped_ratio"] > 0:
        line += f"  cut off {m['completions/clipped_ratio']:.0%}"
    if "eval/acc" in m:
        line += f"  held-out {m['eval/acc']:.3f}"
    return line
