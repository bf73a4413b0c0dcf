"""
Speed and memory, beside the plain way of doing the same: every row is a ratio of two things that
are run in turn in one process, so that a noisy machine disturbs both alike.

    python -m experiments.bench --quick          # the main ratios, about two minutes on two cores
    python -m experiments.bench                  # all of them, in bench.json

The model is a Qwen2.5-Omni thinker with random weights, float32, and text-only prompts: towers are
frozen in RL and their outputs cached, so they are no part of a step. "Copies" is what the field
does: G copies of the prompt in one batch through the model's own forward, with full logits.

The whole step stands beside TRL's GRPOTrainer, where that is installed: pip install trl datasets.

P prompt tokens, C completion tokens, G completions of a prompt, B prompts.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import copy
import json
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2_5OmniThinkerConfig
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

import buffer
import train_rl
from grpo import group_advantages
from models.inputs import Prompt
from models.policy import Policy, completion_logprobs
from models.rollout import rollout
from run import arguments, optim
from run.run_dir import git_commit
from training.micro_batches import WeightedGroup, add_ref_logprobs, dummy_group, pack

SIZES = [(512, 64, 8), (1024, 64, 8), (2048, 128, 8), (4096, 128, 8)]  # P, C, G
ROLLOUTS = [(512, 64, 8, 2), (512, 64, 8, 8), (1024, 64, 8, 8)]  # P, C, G, B; the first: --quick
STEPS = [(512, 64, 8, 2), (1024, 64, 8, 2), (2048, 64, 8, 2)]  # P, C, G, B


PARTS = ["update", "rollout", "step"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    flag = parser.add_argument
    flag("--quick", action="store_true", help="the smaller sizes, fewer repeats")
    flag(
        "--only",
        nargs="+",
        choices=PARTS,
        help="run only these parts; keep the others as they are in --out",
    )
    flag("--out", default="bench.json", help="file for all numbers")
    flag("--repeats", type=int, default=5, help="runs of each side; the median counts")
    flag("--threads", type=int, default=2, help="threads of torch")
    flag("--hidden", type=int, default=256, help="width of the text model")
    flag("--layers", type=int, default=4, help="layers of the text model")
    flag("--vocab", type=int, default=8192, help="size of the vocabulary; the 7B model has 152,064")
    return parser.parse_args(argv)


# ---- the two sides -----------------------------------------------------------------------------


def thinker_config(*, hidden, intermediate, layers, heads, kv_heads, vocab):
    """A text model of these sizes; the towers, which are no part of the figures, are tiny."""
    part = hidden // heads // 16
    sections = [2 * part, 3 * part, 3 * part]  # of a rotary position: time, height, width
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=sections)
    return Qwen2_5OmniThinkerConfig(
        text_config=dict(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rope_parameters=rope,
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            depth=1,
            hidden_size=64,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=hidden,
            fullatt_block_indexes=[0],
            initializer_range=0.02,
        ),
        audio_config=dict(
            d_model=64,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            output_dim=hidden,
            initializer_range=0.02,
        ),
        vision_start_token_id=1,
        audio_token_index=2,
        image_token_index=3,
        video_token_index=4,
        audio_start_token_id=5,
        audio_end_token_id=6,
    )


def build_models(hidden, layers, vocab):
    """-> (our policy, the plain thinker), the same weights."""
    config = thinker_config(
        hidden=hidden,
        intermediate=4 * hidden,
        layers=layers,
        heads=hidden // 64,
        kv_heads=max(1, hidden // 128),
        vocab=vocab,
    )
    torch.manual_seed(0)
    plain = Thinker(config)
    plain.model.visual.requires_grad_(False)
    plain.model.audio_tower.requires_grad_(False)
    ours = Thinker(copy.deepcopy(config))  # a config also says which attention is used
    ours.load_state_dict(plain.state_dict())
    return Policy(ours, train_towers=False), plain


def make_inputs(vocab, num_prompt, num_completion, group_size, num_prompts=1):
    """-> list of Prompt, list of lists of completions (num_completion,): random tokens"""
    generator = torch.Generator().manual_seed(1)
    prompts, completions = [], []
    for _ in range(num_prompts):
        ids = torch.randint(10, vocab, (num_prompt,), generator=generator)
        prompts.append(Prompt(ids, torch.arange(num_prompt).expand(3, -1), {}))
        group = torch.randint(10, vocab, (group_size, num_completion), generator=generator)
        completions.append(list(group))
    return prompts, completions


def update_ours(policy, prompts, completions):
    logprobs, _, _ = completion_logprobs(policy, prompts, completions, 1.0)
    logprobs.mean().backward()
    policy.zero_grad()
    return logprobs.detach()


def copies_logprobs(plain, prompts, completions):
    """G copies of each prompt in one batch, with full logits."""
    rows = []
    for prompt, group in zip(prompts, completions):
        copies = prompt.input_ids.expand(len(group), -1)
        rows.append(torch.cat([copies, torch.stack(group)], dim=1))
    ids = torch.cat(rows).to(plain.device)  # (B G, P + C)
    num_prompt = len(prompts[0].input_ids)
    logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logprobs = logits[:, num_prompt - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[:, num_prompt:, None])[..., 0]


def update_copies(plain, prompts, completions):
    logprobs = copies_logprobs(plain, prompts, completions)
    logprobs.mean().backward()
    plain.zero_grad()
    return logprobs.detach()


def rollout_ours(policy, prompts, group_size, num_tokens):
    counts, seeds = [group_size] * len(prompts), range(len(prompts))
    return rollout(
        policy,
        prompts,
        counts,
        temperature=1.0,
        max_new_tokens=num_tokens,
        eos_ids=[-1],
        seeds=seeds,
    )


def rollout_generate(plain, prompts, group_size, num_tokens):
    ids = torch.stack([p.input_ids for p in prompts]).repeat_interleave(group_size, dim=0)
    ids = ids.to(plain.device)
    return plain.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,  # the log-probs are part of the job
    )


# ---- measuring ---------------------------------------------------------------------------------


def in_turn(task, other_task, repeats):
    """-> median seconds of both, run alternately after one warm-up each."""
    seconds, other_seconds = [], []
    for i in range(repeats + 1):
        for run_it, times in ((task, seconds), (other_task, other_seconds)):
            began = time.perf_counter()
            run_it()
            if i > 0:
                times.append(time.perf_counter() - began)
    return statistics.median(seconds), statistics.median(other_seconds)


def peak_memory(args, side, size):
    """MB that one update adds to the process at its peak, in a process of its own."""
    sizes = (args.hidden, args.layers, args.vocab)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (args.threads, sizes, side, size))


def _measure_memory(threads, sizes, side, size):
    torch.set_num_threads(threads)
    policy, plain = build_models(*sizes)
    vocab = sizes[-1]
    task = partial(update_ours, policy) if side == "ours" else partial(update_copies, plain)
    task(*make_inputs(vocab, 16, 4, 2))  # what torch allocates once
    inputs = make_inputs(vocab, *size)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = resident_mb("VmRSS")
    task(*inputs)
    return resident_mb("VmHWM") - before


def resident_mb(what):
    """VmRSS: memory the process holds now; VmHWM: its peak; MB."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def matrices(config):
    """Weights of a text model that a token is multiplied with: (the layers', the head's)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    attention = hidden // heads * (2 * heads + 2 * config.num_key_value_heads)
    layer = hidden * (attention + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer, hidden * config.vocab_size


def update_flops(config, size, per_weight=6):
    """6 a weight and token (4 if it is frozen), 12 an attention score and width."""
    num_prompt, num_completion, group_size = size
    layers, head = matrices(config)
    own = group_size * num_completion
    scores = num_prompt**2 / 2 + own * (num_prompt + num_completion / 2)
    width = config.hidden_size * config.num_hidden_layers
    return per_weight * (layers * (num_prompt + own) + head * own) + 12 * scores * width


def print_table(title, rows):
    """The numbers of each row under their names."""
    names = [name for name in max(rows, key=len) if name != "size"]
    print(f"\n{title:20}" + "".join(f"{name:>13}" for name in names))
    for row in rows:
        size = "/".join(map(str, row["size"]))
        cells = ["-" if row.get(name) is None else f"{row[name]:.4g}" for name in names]
        print(f"{size:20}" + "".join(f"{cell:>13}" for cell in cells))


def bench_updates(args, policy, plain):
    rows = []
    for size in SIZES[:2] if args.quick else SIZES:
        num_prompt, num_completion, group_size = size
        inputs = make_inputs(args.vocab, *size)
        gap = (update_ours(policy, *inputs) - update_copies(plain, *inputs)).abs().max().item()
        assert gap < 1e-4, f"the two sides differ by {gap}"
        ours = partial(update_ours, policy, *inputs)
        copies = partial(update_copies, plain, *inputs)
        ours_s, copies_s = in_turn(ours, copies, args.repeats)
        num_tokens = num_prompt + group_size * num_completion
        row = {
            "size": size,
            "ours_s": ours_s,
            "copies_s": copies_s,
            "ratio": copies_s / ours_s,
            "token_ratio": group_size * (num_prompt + num_completion) / num_tokens,
            "ours_mb": peak_memory(args, "ours", size),
            "copies_mb": peak_memory(args, "copies", size),
            "logprob_gap": gap,
        }
        rows.append(row)
    print_table("update P/C/G", rows)
    return rows


def bench_rollouts(args, policy, plain):
    rows = []
    for size in ROLLOUTS[:1] if args.quick else ROLLOUTS[1:]:
        num_prompt, num_tokens, group_size, num_prompts = size
        prompts, _ = make_inputs(args.vocab, num_prompt, 1, 1, num_prompts)
        ours = partial(rollout_ours, policy, prompts, group_size, num_tokens)
        theirs = partial(rollout_generate, plain, prompts, group_size, num_tokens)
        ours_s, generate_s = in_turn(ours, theirs, min(args.repeats, 3))
        row = {
            "size": size,
            "ours_s": ours_s,
            "generate_s": generate_s,
            "ratio": generate_s / ours_s,
            "tokens_per_s": num_tokens * group_size * num_prompts / ours_s,
        }
        rows.append(row)
    print_table("rollout P/C/G/B", rows)
    return rows


# ---- a whole step, beside TRL -------------------------------------------------------------------


def our_step(args, policy, reference, optimizer, prompts, size, step):
    """The baseline's step as train_rl.py makes it: 8 fresh, reward, KL, one update of AdamW."""
    _, num_tokens, group_size, num_prompts = size
    rolled = rollout_ours(policy, prompts, group_size, num_tokens)
    rewards = [torch.tensor([float(c.ids[0] % 7) for c in group]) for group in rolled]
    groups = []
    for prompt, group, reward in zip(prompts, rolled, rewards):
        entries = [
            buffer.Entry("q", c.ids, c.logprobs, r, {}, step, False)
            for c, r in zip(group, reward.tolist())
        ]
        weight = 1 / (num_prompts * group_size)
        groups.append(WeightedGroup(prompt, entries, group_advantages(reward), weight))
    two_tokens = Prompt(prompts[0].input_ids[:2], prompts[0].position_ids[:, :2], {})
    batches = pack(groups, args.micro_tokens, dummy_group(two_tokens))
    entries = [group.entries for group in groups]
    add_ref_logprobs(policy, reference, batches, entries, args.temperature)
    train_rl.add_gradient(
        policy,
        batches,
        step,
        temperature=args.temperature,
        tas=dict(shape=args.tas_shape, tas_lambda=args.tas_lambda),
        clip_eps=args.clip_eps,
        kl_coef=args.kl_coef,
    )
    optim.clip_grad_norm(policy)
    optimizer.step()
    optimizer.zero_grad()


class OurSteps:
    """Each call is one of our steps."""

    SETTINGS = argparse.Namespace(  # the flags of train_rl.py that a gradient reads
        algo="avatar",
        micro_tokens=16384,
        kl_coef=0.1,
        temperature=1.0,
        clip_eps=0.2,
        tas_shape="uniform",
        tas_lambda=0.0,
    )

    def __init__(self, policy, reference, optimizer, prompts, size):
        self.policy, self.reference, self.optimizer = policy, reference, optimizer
        self.prompts, self.size = prompts, size
        self.step = 0

    def __call__(self):
        self.step += 1
        our_step(
            self.SETTINGS,
            self.policy,
            self.reference,
            self.optimizer,
            self.prompts,
            self.size,
            self.step,
        )


def trl_trainer(args, size, folder, our_step):
    """TRL's trainer of the same text dimensions, prompts, lengths and settings; no clip in it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    num_prompt, num_tokens, group_size, num_prompts = size
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")
    inputs, _ = make_inputs(args.vocab, num_prompt, 1, 1, num_prompts)
    texts = [" ".join(f"w{i}" for i in prompt.input_ids.tolist()) for prompt in inputs]
    config = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        tie_word_embeddings=False,
        max_position_embeddings=32768,
        eos_token_id=2,
        pad_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)  # TRL loads the reference from there
    settings = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=args.repeats + 1,
        learning_rate=1e-6,
        per_device_train_batch_size=group_size,
        gradient_accumulation_steps=num_prompts,
        num_generations=group_size,
        max_completion_length=num_tokens,
        beta=0.1,
        loss_type="grpo",
        generation_kwargs=dict(min_new_tokens=num_tokens),
        top_k=0,
        gradient_checkpointing=False,
    )

    class InTurn(TrainerCallback):
        """Our step just before each of TRL's."""

        times = ([], [])

        def on_step_begin(self, *_, **__):
            began = time.perf_counter()
            our_step()
            self.times[0].append(time.perf_counter() - began)
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.times[1].append(time.perf_counter() - self.began)

    def reward(completion_ids, **_):
        return [float(ids[0] % 7) for ids in completion_ids]

    data = Dataset.from_dict(dict(prompt=texts * (args.repeats + 1)))
    timer = InTurn()
    trainer = GRPOTrainer(
        folder,
        reward,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[timer],
    )
    return trainer, timer.times


def bench_steps(args, policy):
    """Seconds of a whole step: rollout, reward, reference, update."""
    try:
        import trl
    except ImportError:
        print("\nstep beside TRL: not run (pip install trl datasets)")
        return None
    rows = []
    for size in [(1024, 64, 8, 1)] if args.quick else STEPS:
        reference = copy.deepcopy(policy).requires_grad_(False)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6)
        prompts, _ = make_inputs(args.vocab, size[0], 1, 1, size[3])
        ours = OurSteps(policy, reference, optimizer, prompts, size)
        with tempfile.TemporaryDirectory() as folder:
            trainer, times = trl_trainer(args, size, folder, ours)
            trainer.train()
        ours_s, trl_s = (statistics.median(side[1:]) for side in times)  # the first warms up
        log = trainer.state.log_history
        assert len(times[0]) == len(times[1]) == args.repeats + 1, log
        rows.append({"size": size, "ours_s": ours_s, "trl_s": trl_s, "ratio": trl_s / ours_s})
    print_table(f"step P/C/G/B, {trl.__version__}", rows)
    return rows


def main():
    args = parse_args()
    if args.quick:
        args.repeats = min(args.repeats, 2)
    torch.set_num_threads(args.threads)
    policy, plain = build_models(args.hidden, args.layers, args.vocab)
    shape = f"width {args.hidden}, {args.layers} layers, vocabulary {args.vocab}"
    print(f"torch {torch.__version__}, {args.threads} threads, float32, {shape}")
    out = Path(args.out)
    result = {}
    if args.only and out.exists():  # the other parts stay as they were measured
        result = json.loads(out.read_text())
    parts = args.only or PARTS
    if "update" in parts:
        result["update"] = bench_updates(args, policy, plain)
    if "rollout" in parts:
        result["rollout"] = bench_rollouts(args, policy, plain)
    if "step" in parts:
        result["step"] = bench_steps(args, policy)
    for part in parts:
        result[f"{part} measured with"] = {"arguments": vars(args), "commit": git_commit()}
    out.write_text(json.dumps(result, indent=1))
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
