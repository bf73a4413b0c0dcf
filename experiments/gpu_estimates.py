"""
Memory and time on GPUs, computed: the tables of docs/gpus.md. Nothing here runs on a GPU.

    python -m experiments.gpu_estimates
    python -m experiments.gpu_estimates --prompt-tokens 16384 --rollout-prompts 2

Weights are counted on the true model, built without memory. The sizes of activations are counts of
tensors; tests/test_gpu_estimates.py measures them in the real code on the meta device. Time comes from
operation counts and the rates below, which are assumed.

L tokens of a packed row, M of them that predict a token, P prompt tokens, C completion tokens,
D width, I width inside the MLP, H heads, K key/value heads, E head width, V vocabulary.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import dataclasses

import torch
from transformers import Qwen2_5OmniThinkerConfig
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from experiments.bench import matrices
from models.head import CHUNK
from models.loading import wrap_policy
from run import arguments

VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
MODELS = {  # text model; the towers differ in the width of their output alone
    "Qwen2.5-Omni-7B": dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-Omni-3B": dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=False,  # not known; if they are tied, it needs .6 GB less
    ),
}
NUM_GPUS = (1, 2, 4, 8)
CARDS = (24, 32, 40, 48, 80, 141)  # GB
CUDA = 3e9  # bytes for CUDA's own memory and fragments: a guess
BF16, FLOAT32 = 2, 4  # bytes

# An H100: operations and bytes a second that a kernel reaches, seconds to start one.
MATMUL = 620e12
FLASH_FORWARD, FLASH_BACKWARD = 380e12, 300e12
BANDWIDTH = 2.7e12
KERNEL = 2e-6
# Read and written by all other kernels of an update, a token and layer: counted on the meta device for
# the 7B model, in units of its width and inner width together.
BYTES_PER_UNIT = 73.5e6 / 28 / (3584 + 18944)
KERNELS_PER_LAYER = 941 / 28  # of a decoded token with LoRA (tests/test_gpu.py)
LARGE_PER_LAYER = 5  # of these: products with the layer's weights


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    flag = parser.add_argument
    flag("--prompt-tokens", type=int, default=8192, help="tokens of a prompt")
    flag("--max-new-tokens", type=int, default=2048, help="tokens of a completion at most")
    flag("--completions", type=int, default=8, help="completions of a prompt, fresh ones at most")
    flag("--prompts-per-step", type=int, default=8, help="over all GPUs")
    flag("--rollout-prompts", type=int, default=0, help="as in train_rl.py; 0 = all")
    flag("--micro-tokens", type=int, default=16384, help="as in train_rl.py")
    flag("--lora-rank", type=int, default=16, help="as in train_rl.py")
    return parser.parse_args(argv)


# ---- what there is -----------------------------------------------------------------------------


@dataclasses.dataclass
class Sizes:
    """Numbers of weights, and widths."""

    text: int  # all weights of the text model
    root: int  # of these: embedding, head, last norm
    towers: int
    lora: int  # weights of the adapter
    layers: int
    width: int  # D
    inner: int  # I
    kv_width: int  # K E
    qkv_width: int  # (H + 2 K) E
    vocab: int


def sizes_of(policy):
    """Sizes of a policy with an adapter; it may lie on the meta device."""
    text = policy.thinker.config.text_config
    language_model = policy.thinker.model.language_model
    named = dict(policy.named_parameters())
    adapter = {name for name in named if ".lora_" in name}
    head_width = text.hidden_size // text.num_attention_heads
    towers = {p for tower in policy.towers for p in tower.parameters()}
    whole = sum(named[name].numel() for name in named.keys() - adapter)
    num_towers = sum(p.numel() for p in towers)
    in_layers = sum(
        p.numel() for name, p in language_model.layers.named_parameters() if ".lora_" not in name
    )
    return Sizes(
        text=whole - num_towers,
        root=whole - num_towers - in_layers,
        towers=num_towers,
        lora=sum(named[name].numel() for name in adapter),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner=text.intermediate_size,
        kv_width=text.num_key_value_heads * head_width,
        qkv_width=text.hidden_size + 2 * text.num_key_value_heads * head_width,
        vocab=text.vocab_size,
    )


def build(name, lora_rank):
    """A model of MODELS on the meta device, with an adapter -> Policy"""
    text = MODELS[name]
    config = Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config=VISION | dict(out_hidden_size=text["hidden_size"]),
        audio_config=dict(output_dim=text["hidden_size"]),
    )
    with torch.device("meta"):
        return wrap_policy(Thinker(config), lora_rank, train_towers=False, empty=True)


# ---- memory, bytes -----------------------------------------------------------------------------


def kept_weights(sizes, num_gpus, full, in_update):
    """What lies on a GPU all the time. What trains: float32 value, two moments, in the update a gradient."""
    per_trained = FLOAT32 * (4 if in_update else 3)
    towers = BF16 * sizes.towers
    if full:
        reference = BF16 * sizes.text / num_gpus
        # FSDP gathers the reference's root at its first forward and keeps it: there is no backward
        reference += BF16 * sizes.root
        return per_trained * sizes.text / num_gpus + reference + towers
    # an adapter that is trained on has a frozen copy, which is the reference
    adapter = (per_trained + FLOAT32) * sizes.lora / num_gpus
    return BF16 * sizes.text / num_gpus + adapter + towers


def is_sharded(num_gpus, full):
    """One GPU holds a LoRA policy without FSDP, and so without gathered copies."""
    return num_gpus > 1 or full


def keys_and_values(sizes, num_tokens, num_bytes=BF16):
    return 2 * sizes.layers * sizes.kv_width * num_tokens * num_bytes


def prefill_activations(sizes, num_tokens):
    """At the peak of a layer without gradients, beside the keys and values."""
    return BF16 * num_tokens * (3 * sizes.inner + 5 * sizes.width)


def checkpoints(sizes, num_tokens):
    """The inputs of all layers that are computed again in the backward pass: all but the last."""
    return BF16 * (sizes.layers - 1) * num_tokens * sizes.width


def last_layer_activations(sizes, num_tokens, num_predicting):
    """Of the last layer, which is not computed again: most of it sees M tokens only."""
    of_all = 4 * sizes.width + 3 * sizes.kv_width
    of_predicting = 9 * sizes.width + 4 * sizes.inner
    return BF16 * (num_tokens * of_all + num_predicting * of_predicting)


def layer_backward(sizes, num_tokens):
    """At the peak of the backward pass of a layer that is computed again."""
    return BF16 * num_tokens * (6 * sizes.inner + 10 * sizes.width + 3 * sizes.kv_width)


def head_activations(sizes):
    """Logits of a chunk in float32: log_softmax and entropy hold them four times."""
    return 4 * FLOAT32 * CHUNK * sizes.vocab


def update_activations(sizes, num_tokens, num_predicting):
    in_head = last_layer_activations(sizes, num_tokens, num_predicting) + head_activations(sizes)
    return checkpoints(sizes, num_tokens) + max(in_head, layer_backward(sizes, num_tokens))


def update_bytes(sizes, args, num_gpus, full):
    """Peak of an update on each GPU."""
    # a group that is larger than --micro-tokens is read in parts with at least half for completions
    own = max(args.micro_tokens - args.prompt_tokens, args.micro_tokens // 2)
    own = min(own, args.completions * args.max_new_tokens)
    total = kept_weights(sizes, num_gpus, full, in_update=True)
    total += update_activations(sizes, args.prompt_tokens + own, own)
    if is_sharded(num_gpus, full):
        layer = (sizes.text - sizes.root) / sizes.layers
        total += BF16 * (sizes.root + 2 * layer)  # a layer, and the next one on its way
        if full:  # gradients before they are summed: the head's, and a layer's, also in float32
            total += BF16 * sizes.vocab * sizes.width + (BF16 + FLOAT32) * layer
    return total


def rollout_bytes(sizes, args, num_gpus, full):
    """Peak of a rollout on each GPU: while the prompts are read, or at the last token."""
    prompts = -(-args.prompts_per_step // num_gpus)
    if args.rollout_prompts:
        prompts = min(prompts, args.rollout_prompts)
    total = kept_weights(sizes, num_gpus, full, in_update=False)
    if is_sharded(num_gpus, full):
        total += BF16 * sizes.text  # all layers, gathered
    total += keys_and_values(sizes, prompts * args.prompt_tokens)
    packed = max(args.prompt_tokens, min(args.micro_tokens, prompts * args.prompt_tokens))
    # fused_decode.py copies the weights for q, k and v into one matrix
    decoding = BF16 * sizes.layers * sizes.width * sizes.qkv_width
    decoding += keys_and_values(sizes, prompts * args.completions * args.max_new_tokens)
    return total + max(prefill_activations(sizes, packed), decoding)


def cards_for(num_bytes):
    """The smallest card that would do, as text."""
    needed = (num_bytes + CUDA) / 1e9
    return next((f"{card} GB" for card in CARDS if card >= needed), "none")


# ---- time, seconds ------------------------------------------------------------------------------


def forward_seconds(sizes, layer_weights, num_prompt, lengths):
    """-> (products, attention) of one forward pass over a prompt and its completions."""
    own = sum(lengths)
    products = 2 * layer_weights * (num_prompt + own) / MATMUL
    scores = num_prompt**2 / 2 + num_prompt * own + sum(length**2 / 2 for length in lengths)
    attention = 4 * sizes.layers * sizes.width * scores
    return products, attention


def step_seconds(sizes, layer_weights, *, prompts, num_prompt, longest, mean_length):
    """
    A step of one GPU with the defaults: 4 fresh and 4 replayed completions of each prompt.

    prompts      of this GPU
    longest      tokens of its longest completion; decoding ends with it
    returns      {part: seconds}
    """
    lengths = [mean_length] * 4
    products, attention = forward_seconds(sizes, layer_weights, num_prompt, lengths)
    other_per_token = sizes.layers * (sizes.width + sizes.inner) * BYTES_PER_UNIT / BANDWIDTH
    other = other_per_token * (num_prompt + sum(lengths))
    # forward, forward again, backward for the activations alone: the weights are frozen
    gradient = 3 * products + attention * (2 / FLASH_FORWARD + 2.5 / FLASH_BACKWARD) + other
    reference = products + attention / FLASH_FORWARD + other / 4
    read, read_attention = forward_seconds(sizes, layer_weights, num_prompt, [])
    prefill = read + read_attention / FLASH_FORWARD + other_per_token * num_prompt / 4

    cached = prompts * (num_prompt + 4 * longest / 2)
    moved = BF16 * sizes.text + keys_and_values(sizes, cached)
    small_kernels = sizes.layers * (KERNELS_PER_LAYER - LARGE_PER_LAYER)
    token = moved / BANDWIDTH + small_kernels * KERNEL
    return dict(
        prefill=prompts * prefill,
        decoding=longest * token,
        gradients=2 * prompts * gradient,
        references=2 * prompts * reference,
    )


# ---- tables ------------------------------------------------------------------------------------


def print_memory(name, sizes, args):
    print(f"\n{name}: GB per GPU at the peak of the rollout / of the update\n")
    print(
        f"| GPUs | `--lora-rank {args.lora_rank}` | card | `--lora-rank 0` | card |\n|---|---|---|---|---|"
    )
    for num_gpus in NUM_GPUS:
        cells = []
        for full in (False, True):
            peaks = [part(sizes, args, num_gpus, full) for part in (rollout_bytes, update_bytes)]
            cells.append(" / ".join(f"{peak / 1e9:.0f}" for peak in peaks))
            cells.append(cards_for(max(peaks)))
        print(f"| {num_gpus} | " + " | ".join(cells) + " |")


def print_parts(name, sizes, args):
    num_tokens = args.prompt_tokens + max(
        args.micro_tokens - args.prompt_tokens, args.micro_tokens // 2
    )
    parts = {
        "all weights of the text model in training, 16 bytes each": 16 * sizes.text,
        "the text model in bfloat16": BF16 * sizes.text,
        "towers": BF16 * sizes.towers,
        "adapter in training, with its frozen copy": 20 * sizes.lora,
        "keys and values of a prompt": keys_and_values(sizes, args.prompt_tokens),
        "keys and values of a completion": keys_and_values(sizes, args.max_new_tokens),
        f"reading {args.micro_tokens:,} tokens of prompts": prefill_activations(
            sizes, args.micro_tokens
        ),
        f"update of {num_tokens:,} tokens: inputs of the layers": checkpoints(sizes, num_tokens),
        "update: a layer in the backward pass": layer_backward(sizes, num_tokens),
        "update: logits of a chunk": head_activations(sizes),
    }
    print(f"\n{name}\n\n| part | GB |\n|---|---|")
    for part, num_bytes in parts.items():
        print(f"| {part} | {num_bytes / 1e9:.2f} |")


def print_time(name, sizes, config):
    layer_weights, _ = matrices(config)
    print(f"\n{name}: seconds of a step on H100s, LoRA, prompts of 8,192 tokens\n")
    print(
        "| GPUs | `--prompts-per-step` | longest completion | prefill | decoding | gradients | references "
        "| step | hours for 400 steps | completions per GPU hour |\n" + "|---" * 10 + "|"
    )
    for num_gpus, prompts in ((1, 8), (8, 8), (8, 32)):
        for longest, mean_length in ((1200, 600), (2048, 2048)):
            seconds = step_seconds(
                sizes,
                layer_weights,
                prompts=prompts // num_gpus,
                num_prompt=8192,
                longest=longest,
                mean_length=mean_length,
            )
            step = sum(seconds.values())
            parts = " | ".join(f"{value:.1f}" for value in seconds.values())
            per_hour = 4 * prompts / step * 3600 / num_gpus
            print(
                f"| {num_gpus} | {prompts} | {longest:,} | {parts} | {step:.0f} | {step / 9:.1f} "
                f"| {per_hour:.0f} |"
            )


def main():
    args = parse_args()
    for name in MODELS:
        policy = build(name, args.lora_rank)
        sizes = sizes_of(policy)
        print_memory(name, sizes, args)
        print_parts(name, sizes, args)
        print_time(name, sizes, policy.thinker.config.text_config)


if __name__ == "__main__":
    main()
