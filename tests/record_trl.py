"""
Records what trl's GRPOTrainer makes of given tensors: tests/trl_loss.json, for test_grpo.py.

    pip install trl==1.16.0 datasets && python tests/record_trl.py        # not needed to run the tests

With `use_bias_correction_kl`: its KL is r k3, the gradient also through r. With one ratio a completion
(`importance_sampling_level="sequence"`) without a KL: there its r is that one, ours is the token's [U22].
`_compute_loss` is called unbound, on a stand-in that holds its settings and hands it our log-probs.
"""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import GRPOTrainer

EPS, BETA, DELTA = 0.2, 0.1, 3.0


def random_case(seed, per_token):
    g = torch.Generator().manual_seed(seed)
    n, t = 6, 7
    lengths = torch.randint(1, t + 1, (n,), generator=g)
    mask = (torch.arange(t) < lengths[:, None]).long()
    old = -3 * torch.rand(n, t, generator=g)
    logprobs = old + 0.6 * torch.randn(n, t, generator=g)
    ref = old + 0.3 * torch.randn(n, t, generator=g)
    # ours truncates the ratio that the KL is multiplied with [U20]: where it does, let the KL be 0
    ref = torch.where((logprobs - old).exp() > DELTA, logprobs, ref)
    advantages = torch.randn(*((n, t) if per_token else (n,)), generator=g)
    return dict(logprobs=logprobs, old=old, ref=ref, advantages=advantages, mask=mask)


def trl_loss(case, level, beta):
    logprobs = case["logprobs"].clone().requires_grad_()
    alone = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            logprobs,
            torch.zeros_like(logprobs),
            None,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=EPS,
        epsilon_high=EPS,
        loss_type="grpo",
        args=SimpleNamespace(delta=DELTA, use_bias_correction_kl=True),
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        accelerator=alone,
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    ones = torch.ones(len(logprobs), 1, dtype=torch.long)
    loss = GRPOTrainer._compute_loss(
        stand_in,
        None,
        dict(
            prompt_ids=ones,
            prompt_mask=ones,
            completion_ids=case["mask"],
            completion_mask=case["mask"],
            advantages=case["advantages"],
            old_per_token_logps=case["old"],
            ref_per_token_logps=case["ref"],
        ),
    )
    loss.backward()
    return loss.item(), logprobs.grad


if __name__ == "__main__":
    recorded = []
    for seed in range(6):
        level, beta = ("sequence", 0.0) if seed > 3 else ("token", BETA)
        case = random_case(seed, per_token=level == "token" and seed % 2 == 1)
        loss, grad = trl_loss(case, level, beta)
        told = dict(level=level, beta=beta, loss=loss, grad=grad.tolist())
        recorded.append({k: v.tolist() for k, v in case.items()} | told)
    about = dict(trl=version("trl"), torch=torch.__version__, eps=EPS, delta=DELTA)
    Path(__file__).with_name("trl_loss.json").write_text(json.dumps(about | dict(cases=recorded)))
