"""
The rewards of AVATAR, arXiv:2508.03100: format, accuracy, self-consistency, judge, and their sum.
Needs answers.py beside it and the standard library only: copy the two files freely.
"""

import math
import re

from answers import (  # noqa: F401  parse_answer is offered from here
    edit_distance,
    normalize_answer,
    normalize_truth,
    parse_answer,
    rouge_f1,
    split_completion,
)

PARTS = ("format", "acc", "self", "judge")


def format_reward(text):
    """
    R_format = +1 if the completion is <think>...</think><answer>...</answer>, else -1  [R.format]

    text       str           the completion without its prompt; tags are lower case
    returns    float         1.0 or -1.0; space around the blocks is allowed, an empty block is not
    """
    pieces = re.split(r"(</?(?:think|answer)>)", text)
    if pieces[1::2] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return -1.0
    before, think, between, answer, after = (piece.strip() for piece in pieces[::2])
    return 1.0 if think and answer and not (before or between or after) else -1.0


def accuracy_reward(answer, truth, answer_type, options=None):
    """
    R_acc = 1[a = y]                                    choice, yesno, text             [R.acc]
    R_acc = max(0, 1 - |a - y| / |y|), 1[a = y] if y=0  number
    R_acc = 2 |a & y| / (|a| + |y|)                     multi, location: F1 of two sets
    R_acc = max(0, 1 - edits / |y|)                     ocr: 1 - word error rate
    R_acc = mean of ROUGE-1, ROUGE-2, ROUGE-L (F1)      free-form                       [U21]
    Scores the parsed answer a against the truth y, both in the form of normalize_answer. [U11]

    answer       str or None        parsed answer; None scores 0
    truth        str, int, float    choice: a letter, an option's text, or an int index from 0;
                 or list            multi: also a list of these
    returns      float in [0, 1]
    raises       ValueError         a truth that cannot be read; as normalize_answer

    The truth is read first: accuracy_reward(None, ...) checks a row. A str truth equal to an
    option's text is that option even if it is also a letter; give the index in such rows.
    """
    truth = normalize_truth(truth, answer_type, options)
    answer = normalize_answer(answer, answer_type, options)
    if answer is None:
        return 0.0
    if answer_type == "number" and truth != 0:
        return max(0.0, 1 - abs(answer - truth) / abs(truth))
    if answer_type in ("multi", "location"):
        return 2 * len(answer & truth) / (len(answer) + len(truth))
    if answer_type == "ocr":
        return max(0.0, 1 - edit_distance(answer, truth, substitution_cost=1) / len(truth))
    if answer_type == "free-form":
        return rouge_f1(answer, truth)
    return float(answer == truth)


def self_consistency_rewards(answers, mean_logprobs, answer_type, options=None):
    """
    y* = argmax_y (n_y, mean of l_i over a_i = y),  R_self_i = 1[a_i = y*]              [R.self]
    Takes the majority of one prompt's group for the truth; the likelihood decides ties only.

    answers        G of str or None   parsed answers, compared in the form of normalize_answer
    mean_logprobs  G of float, nats   l_i: mean log-likelihood of a completion's tokens
    returns        list of G floats   1.0 or 0.0; all 0 when no answer can be read
    raises         ValueError         lengths differ; NaN for an answer that votes

    [U13] None has no vote and no reward, however many there are. A lone readable answer wins: pair
    this reward with one that does not come from the group. A second tie goes to the first.
    """
    if len(answers) != len(mean_logprobs):
        raise ValueError(f"{len(answers)} answers but {len(mean_logprobs)} mean_logprobs")
    forms = [normalize_answer(answer, answer_type, options) for answer in answers]
    votes = {}  # form: the log-likelihoods of those who gave it
    for form, logprob in zip(forms, mean_logprobs):
        if form is not None:
            votes.setdefault(form, []).append(logprob)
    ranks = {form: (len(own), math.fsum(own) / len(own)) for form, own in votes.items()}
    if any(math.isnan(mean) for _, mean in ranks.values()):
        raise ValueError(f"NaN in mean_logprobs {mean_logprobs}")
    majority = max(ranks, key=ranks.get, default=None)
    return [float(form is not None and form == majority) for form in forms]


def judge_reward(step_scores):
    """
    R_judge = (1/S) sum_s clip(score_s, 0, 1)                                          [R.judge]
    Averages what the judge gave to the S steps of the reasoning.

    step_scores  S of float, or None
    returns      float in [0, 1]; None is "not judged", which is not zero: no scores, or one
                 among them None, NaN or infinite
    """
    if not step_scores or any(s is None or not math.isfinite(s) for s in step_scores):
        return None
    return sum(min(max(float(s), 0.0), 1.0) for s in step_scores) / len(step_scores)


def reward_completions(row, texts, mean_logprobs, weights, judge):
    """
    R = sum_k w_k r_k                                                                  [R.stage]
    All parts of the reward for the completions of one prompt, and their sum.

    row            dict            `answer`, `answer_type`, `options` of the prompt
    texts          G of str        the completions
    mean_logprobs  G of float      mean log-likelihood of a completion's tokens, nats
    weights        dict of float   format, acc, self, judge: which parts count, and how much
    judge          callable(row, reasoning) -> float in [0, 1]; called only if its part counts; None is
                   "not judged", which is not zero
    returns        G of (R, {part: value}); R None: not judged, leave the completion out
    """
    answer_type, options = row["answer_type"], row.get("options")
    reasonings, answers = zip(*[split_completion(text) for text in texts])
    agreement = self_consistency_rewards(answers, mean_logprobs, answer_type, options)

    scored = []
    for i, text in enumerate(texts):
        parts = {
            "format": format_reward(text),
            "acc": accuracy_reward(answers[i], row["answer"], answer_type, options),
            "self": agreement[i],
        }
        if "judge" in weights:
            parts["judge"] = judge(row, reasonings[i])
        judged = all(parts[part] is not None for part in weights)
        reward = float(sum(weights[part] * parts[part] for part in weights)) if judged else None
        scored.append((reward, parts))
    return scored
