"""
Sampling: prompts are read once, the completions of all of them are decoded together, and the log-prob
of every sampled token is recorded under the distribution that it was sampled from. Where the keys and
values of all prompts would not fit into memory, the prompts come in waves, one after the other.

Prompts that hold the very same media (one object: the questions about one clip) form a clip group. What
they begin with alike, the clip above all, is encoded and read once for the whole group.

B prompts, at most G completions of each, P prompt tokens, T completion tokens, V vocabulary.
rows: the batch that is decoded, a completion in each row.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models import fused_decode
from models.attention import DecodeAttention
from models.clip_prefix import continue_prefix
from models.graphs import DelayedScalar, capture
from models.head import float32_logits
from models.inputs import shared_clip_groups
from models.sharding import in_forward, unsharded
from run.errors import UserError, out_of_memory_advice
from run.packing import pack_sizes

PIECE = 256  # tokens of the vocabulary in one piece of the sampler's first level

# Finished rows are removed when no more than this share of the rows is unfinished. On a GPU an idle row
# costs less than a new recording of the CUDA graph.
COMPACT_BELOW = 0.75
COMPACT_BELOW_ON_GPU = 0.25


class Completion(NamedTuple):
    """One sampled completion. Its mask is its length: EOS is included, if there is one."""

    ids: torch.Tensor  # (T,) int64
    logprobs: torch.Tensor  # (T,) float32, nats, under the policy and temperature that sampled it
    truncated: bool  # whether max_new_tokens came before EOS
    experts: torch.Tensor | None = None  # (T - 1, J, k) uint8, of each token that was read, if kept


@out_of_memory_advice(
    "the rollout: lower --rollout-prompts (0: all prompts of a process at one time) or "
    "--max-new-tokens, also with --resume (eval.py, ask.py: --batch-size)"
)
@torch.no_grad()
@in_forward
def rollout(
    policy,
    prompts,
    num_completions,
    *,
    temperature,
    max_new_tokens,
    eos_ids,
    seeds,
    micro_tokens=16384,
    prompts_at_once=0,
    prefix=None,
    on_token=None,
):
    """
    Samples completions of all prompts and records their log-probs.

    prompts          list of B Prompt
    num_completions  list of B int
    temperature      float          0 = greedy; the log-probs are then those at temperature 1
    max_new_tokens   int
    eos_ids          list of int    each of them ends a completion and belongs to it
    seeds            list of B int  one for each prompt: the other prompts do not change its samples
    micro_tokens     int            prompt tokens that are read at one time
    prompts_at_once  int            prompts that are decoded together; 0 = all. It changes log-probs
                                    by the rounding of a matrix product of another height, no more
    prefix           ClipPrefix     what the one prompt begins with, read before (clip_prefix.py)
    on_token         callable       gets each step's tokens (rows,), to show them as they come
    returns          list of B lists of Completion

    [D3] Nothing is truncated (no top-k, no top-p): the recorded log-probs are those of the full
    distribution that was sampled, which is what `completion_logprobs` recomputes.
    """
    expert_replay = policy.expert_replay
    if expert_replay:
        expert_replay.release()
    completions = []
    wave_size = prompts_at_once or len(prompts)
    with unsharded(policy):
        for first in range(0, len(prompts), wave_size):
            wave = slice(first, first + wave_size)
            completions += decode_together(
                policy,
                prompts[wave],
                num_completions[wave],
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                eos_ids=eos_ids,
                seeds=seeds[wave],
                micro_tokens=micro_tokens,
                prefix=prefix,
                on_token=on_token,
            )
    if expert_replay:
        expert_replay.remember(prompts, completions)
    return completions


def decode_together(
    policy,
    prompts,
    num_completions,
    *,
    temperature,
    max_new_tokens,
    eos_ids,
    seeds,
    micro_tokens,
    prefix,
    on_token,
):
    """One wave of a rollout; arguments and result are those of `rollout`."""
    device = policy.device
    max_completions = max(num_completions)
    clip_groups = shared_clip_groups(prompts)
    completion_index, prompt_index = assign_rows(clip_groups, num_completions)
    completion_index = completion_index.to(device)
    prompt_index = prompt_index.to(device)
    padding = len(prompts) * max_completions  # completion_index of a row that decodes nothing

    eos = torch.tensor(eos_ids, device=device)
    noise = draw_noise(num_completions, max_new_tokens, seeds).to(device)  # (B G + 1, T)
    samples = SampleBuffer(padding + 1, max_new_tokens, device)
    expert_replay = policy.expert_replay
    if expert_replay:
        samples.make_room_for_experts(expert_replay.num_layers, expert_replay.num_chosen)
    num_alive = len(completion_index)
    count_alive = DelayedScalar()
    compact_below = COMPACT_BELOW_ON_GPU if completion_index.is_cuda else COMPACT_BELOW

    if prefix is None:
        logits, attention = prefill(policy, prompts, clip_groups, prompt_index, micro_tokens)
    else:
        (prompt,) = prompts
        logits, attention = continue_prefix(policy, prompt, prefix, len(prompt_index))
    if not logits.isfinite().all():  # of the prompts: one look before anything is sampled
        raise UserError(
            "the model's logits are not finite, so its weights are broken (NaN or infinite): take "
            "another --model; of a run in training, start a new --out with a lower --lr, or "
            "remove the newest checkpoints and --resume"
        )
    logits = logits[prompt_index]  # (rows, V)
    next_positions = torch.stack([prompt.position_ids.max() + 1 for prompt in prompts])
    first_position = next_positions.to(device)[prompt_index]  # (rows,)

    fused = None
    if completion_index.is_cuda and fused_decode.is_supported(policy):
        fused = fused_decode.FusedDecoder(policy)

    def decode_plainly(token, position):
        """
        Reads a token of every row, (rows,) at its position (rows,) -> next logits (rows, V), and with
        --replay-experts the experts that it took.
        """
        embeds = policy.thinker.get_input_embeddings()(token[:, None])
        position_ids = position[None, :, None].expand(3, -1, 1)
        experts = None
        if fused is not None:
            hidden = fused(embeds, position_ids, attention)
        else:
            with expert_replay.recording() if expert_replay else nullcontext() as chosen:
                outputs = policy.thinker.model.language_model(
                    inputs_embeds=embeds,
                    position_ids=position_ids,
                    use_cache=False,
                    shared=attention,
                )
            hidden = outputs.last_hidden_state[:, -1]
            if expert_replay:
                experts = torch.stack(chosen, dim=1).byte()  # (rows, J, k)
        return float32_logits(policy.thinker.lm_head, hidden), experts

    decode = decode_plainly  # until it is recorded
    for step in range(max_new_tokens):
        token, logprob = sample(logits, temperature, noise[completion_index, step])
        ended = torch.isin(token, eos)
        samples.write(completion_index, step, token, logprob, ended)
        if on_token:
            on_token(token)
        completion_index = completion_index.masked_fill(ended, padding)

        # on a GPU the count is two tokens old, so that the host never waits for it
        num_before = num_alive
        num_alive = count_alive((completion_index != padding).sum(), num_alive)
        if num_alive == 0 or step + 1 == max_new_tokens:
            break
        if num_alive < num_before and num_alive <= compact_below * len(completion_index):
            is_alive = (completion_index != padding).view(-1, attention.rows_per_group)
            groups_left, rows_left = compact(is_alive)
            if 0 < len(rows_left) < len(completion_index):
                attention.select(groups_left, rows_left)
                completion_index = completion_index[rows_left]
                token = token[rows_left]
                first_position = first_position[rows_left]

        inputs = token, first_position + step
        if attention.next_token():
            decode = decode_plainly  # the tensors are new; this call also warms up a recording
        elif decode is decode_plainly:
            decode = capture(decode_plainly, inputs)
        logits, experts = decode(*inputs)
        if expert_replay:
            samples.experts[completion_index, step] = experts
    return samples.completions(num_completions)


def assign_rows(clip_groups, num_completions):
    """
    The batch that is decoded. A clip is read once for all rows of its group, so every group has as many
    rows as the largest one; rows that are left over are padding.

    returns  completion_index (rows,)    b G + g: which completion a row decodes; B G for padding
             prompt_index (rows,)        b: which prompt it continues
    """
    max_completions = max(num_completions)
    padding = len(num_completions) * max_completions
    rows_per_group = max(sum(num_completions[b] for b in group) for group in clip_groups)
    completion_index = []
    prompt_index = []
    for group in clip_groups:
        num_padding = rows_per_group
        for b in group:
            first = b * max_completions
            completion_index += range(first, first + num_completions[b])
            prompt_index += [b] * num_completions[b]
            num_padding -= num_completions[b]
        completion_index += [padding] * num_padding
        prompt_index += [group[0]] * num_padding
    return torch.tensor(completion_index), torch.tensor(prompt_index)


def draw_noise(num_completions, max_new_tokens, seeds):
    """All randomness of a rollout, drawn before it -> (B G + 1, T) float64; the last row is padding's"""
    max_completions = max(num_completions)
    noise = torch.zeros(len(seeds) * max_completions + 1, max_new_tokens, dtype=torch.float64)
    for b, (count, seed) in enumerate(zip(num_completions, seeds)):
        generator = torch.Generator().manual_seed(seed)
        first = b * max_completions
        noise[first : first + count] = torch.rand(
            count, max_new_tokens, generator=generator, dtype=torch.float64
        )
    return noise


class SampleBuffer:
    """What has been sampled, on the device; the last slot is scratch space for padding rows."""

    def __init__(self, num_slots, max_new_tokens, device):
        self.ids = torch.zeros(num_slots, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(num_slots, max_new_tokens, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.ended = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.experts = None  # (num_slots, T, J, k) uint8 with --replay-experts, else None

    def make_room_for_experts(self, num_layers, num_chosen):
        shape = (*self.ids.shape, num_layers, num_chosen)
        self.experts = torch.zeros(shape, dtype=torch.uint8, device=self.ids.device)

    def write(self, index, step, token, logprob, ended):
        """One token for each of the slots `index`; all arguments but step (rows,)."""
        self.ids[index, step] = token
        self.logprobs[index, step] = logprob
        self.lengths[index] = step + 1
        self.ended[index] = ended

    def completions(self, num_completions):
        """-> list of lists of Completion, in the host's memory"""
        max_completions = max(num_completions)
        ids = self.ids.cpu()
        logprobs = self.logprobs.cpu()
        lengths = self.lengths.tolist()
        ended = self.ended.tolist()
        experts = None if self.experts is None else self.experts.cpu()
        groups = []
        for b, count in enumerate(num_completions):
            group = []
            for i in range(b * max_completions, b * max_completions + count):
                length = lengths[i]
                completion = Completion(
                    ids[i, :length].clone(),
                    logprobs[i, :length].clone(),
                    truncated=not ended[i],
                    experts=None if experts is None else experts[i, : length - 1].clone(),
                )
                group.append(completion)
            groups.append(group)
        return groups


# ---- prompts -----------------------------------------------------------------------------------


def prefill(policy, prompts, clip_groups, prompt_index, micro_tokens):
    """
    Reads every prompt once. What the prompts of a clip group begin with alike is read once for all of
    them: in a packed row it is the prefix, and the rest of each prompt is a suffix, as a completion is
    in the update. In packs of micro_tokens, because the activations of one long row could be larger than
    the model.

    prompt_index  (rows,)  which prompt each row continues
    returns       logits of the next token (B, V), DecodeAttention of the rows
    """
    device = policy.device
    prefix_lens = []  # one per group
    suffix_ids = {}
    suffix_positions = {}
    sizes = []
    for group in clip_groups:
        prefix_len = common_prefix_length([prompts[b].input_ids for b in group])
        prefix_lens.append(prefix_len)
        for b in group:
            suffix_ids[b] = prompts[b].input_ids[prefix_len:]
            suffix_positions[b] = prompts[b].position_ids[:, prefix_len:]
        sizes.append(prefix_len + sum(len(suffix_ids[b]) for b in group))
    check_no_media(policy.thinker.config, torch.cat(list(suffix_ids.values())))

    logits = []
    recorded = []  # one per pack: number of prefix tokens, {layer: (k, v)}
    for pack in pack_sizes(sizes, micro_tokens):
        first_prompts = [prompts[clip_groups[i][0]] for i in pack]
        prefixes = []
        for i, embeds in zip(pack, policy.embed(first_prompts)):
            prefixes.append(embeds.first(prefix_lens[i]))
        suffixes = []
        for i in pack:
            suffixes.append([(suffix_ids[b], suffix_positions[b]) for b in clip_groups[i]])
        hidden, attention = policy.packed_forward(prefixes, suffixes, record=True)

        # the hidden states begin with the last token of each prefix
        suffix_sizes = torch.tensor([len(ids) for group in suffixes for ids, _ in group])
        last_tokens = len(pack) + suffix_sizes.cumsum(0) - 1
        hidden = hidden[last_tokens.to(device)]
        logits.append(float32_logits(policy.thinker.lm_head, hidden))
        recorded.append((sum(prefix_lens[i] for i in pack), attention.recorded))

    # Prefixes stay packed. Of the suffixes every row gets a copy of its prompt's, and continues it.
    order = torch.tensor([b for group in clip_groups for b in group])  # as the suffixes stand
    place = order.argsort()  # of each prompt among the suffixes
    suffix_lens = torch.tensor([len(suffix_ids[b]) for b in order.tolist()])
    starts = suffix_lens.cumsum(0) - suffix_lens
    longest = int(suffix_lens.max())
    first_tokens = starts[place].to(device)[prompt_index]  # (rows,)
    lengths = suffix_lens[place].to(device)[prompt_index]
    token_index = first_tokens[:, None] + torch.arange(longest, device=device)  # (rows, longest)
    # beyond the end of a suffix stands another one: `lengths` hides it
    token_index = token_index.clamp(max=int(suffix_lens.sum()) - 1)

    prefix_kv = {}
    suffix_kv = {}
    for layer in list(recorded[0][1]):
        # a layer at a time, and dropped at once: twice all may not fit
        parts = [(num_prefix, *kv.pop(layer)) for num_prefix, kv in recorded]
        prefix_k = torch.cat([k[:n] for n, k, _ in parts])
        prefix_v = torch.cat([v[:n] for n, _, v in parts])
        suffix_k = torch.cat([k[n:] for n, k, _ in parts])
        suffix_v = torch.cat([v[n:] for n, _, v in parts])
        prefix_kv[layer] = prefix_k, prefix_v
        suffix_kv[layer] = suffix_k[token_index], suffix_v[token_index]
    attention = DecodeAttention(prefix_kv, prefix_lens, suffix_kv, lengths.int(), longest)
    return torch.cat(logits)[place.to(device)], attention


def common_prefix_length(rows):
    """How many tokens these lists of ids begin with alike; at least one token of each is left over."""
    length = min(len(row) for row in rows) - 1
    is_alike = torch.stack([row[:length] == rows[0][:length] for row in rows]).all(0)
    return int(is_alike.cumprod(0).sum())


def check_no_media(config, suffix_ids):
    """A placeholder after the common part would be read without its features, without an error."""
    placeholders = [config.image_token_id, config.video_token_id, config.audio_token_id]
    has_media = torch.isin(suffix_ids, torch.tensor(placeholders)).any()
    assert not has_media, "prompts that share their media differ before the last of it"


# ---- rows --------------------------------------------------------------------------------------


def compact(is_alive):
    """
    Which rows stay in the batch: the unfinished ones, and finished ones where a group would have fewer
    rows than another.

    is_alive  (groups, rows per group) bool
    returns   indices of the groups with an unfinished row, indices of the rows that stay
    """
    groups_left = is_alive.any(1).nonzero()[:, 0]
    rows_per_group = int(is_alive.sum(1).max())  # 0 if all have ended meanwhile
    unfinished_first = is_alive[groups_left].int().argsort(dim=1, descending=True, stable=True)
    rows = groups_left[:, None] * is_alive.shape[1] + unfinished_first[:, :rows_per_group]
    return groups_left, rows.flatten()


def sample(logits, temperature, noise):
    """
    Samples one token per row by inverting its cumulative distribution at `noise`: a row's token depends
    on nothing but its logits and its noise.

    logits   (n, V)
    noise    (n,) float64 in [0, 1)
    returns  token (n,), its log-prob (n,)
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        token = invert_cdf(logprobs.exp(), noise)
    token = token.clamp(max=logits.shape[1] - 1)  # with NaN the search ends behind the vocabulary
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def invert_cdf(probs, noise):
    """
    The first token at which the cumulative sum of probs exceeds noise x the sum of all: (n, V) -> (n,)

    In two levels: which piece of PIECE tokens, then which token in it. Only sums of pieces and one piece
    are held in float64; a float32 sum over the vocabulary would lose its tail.
    """
    pieces = F.pad(probs, (0, -probs.shape[1] % PIECE)).unflatten(1, (-1, PIECE))
    piece_cdf = pieces.sum(-1, dtype=torch.float64).cumsum(-1)  # (n, V / PIECE)
    target = noise[:, None] * piece_cdf[:, -1:]  # (n, 1)
    piece = torch.searchsorted(piece_cdf, target, right=True)
    piece = piece.clamp(max=piece_cdf.shape[1] - 1)

    target = target - F.pad(piece_cdf, (1, 0)).gather(1, piece)  # less the sum of earlier pieces
    chosen = pieces.gather(1, piece[..., None].expand(-1, -1, PIECE))[:, 0]  # (n, PIECE)
    token_cdf = chosen.double().cumsum(-1)
    # The two sums are taken in different orders and differ by rounding. Stay below the end of the
    # piece, so that the token is one with a probability above 0.
    target = target.clamp(max=token_cdf[:, -1:] * (1 - 1e-12))
    within = torch.searchsorted(token_cdf, target, right=True)
    return (piece * PIECE + within)[:, 0]
