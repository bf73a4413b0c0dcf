"""
The only file that knows the backbone, Qwen2.5-Omni's thinker: load, shard, roll out, log-probs.

A group is one prompt and its completions. Nothing about a prompt is done twice: its clip is encoded
once, it is read once for all its completions, in the rollout and in the update, and many groups
stand in one packed row without padding:

    [ prompt 1 | c11 | c12 | ... | prompt 2 | c21 | ... ]

Every prompt token sees its prompt causally; every completion token sees its prompt and its own
completion; positions go on from the prompt's largest one, in each completion alike.

L packed tokens, P prompt tokens, N completions, T completion tokens, D width, V vocabulary,
H heads, K key/value heads, E head width.
"""

import copy
import json
import re
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, Qwen2_5OmniProcessor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

from transformers.utils.logging import disable_progress_bar

import data

disable_progress_bar()
HEAD_CHUNK = 1024  # tokens whose logits exist at one time
TEXT_LAYERS = r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TOWER_LAYERS = r"q|k|v|q_proj|k_proj|v_proj|out_proj|proj|fc1|fc2|gate_proj|up_proj|down_proj|mlp\.0|mlp\.2"


class Prompt(NamedTuple):
    """One prompt as the model takes it. Media are tensors for the towers, or their outputs."""

    input_ids: torch.Tensor  # (P,) int64, media placeholders filled in
    position_ids: torch.Tensor  # (3, P) int64: TMRoPE time, height, width
    media: dict  # modality -> what its tower takes (dict), or (n, D) what it gave


class Completion(NamedTuple):
    """One sampled completion; the length is the mask, EOS included."""

    ids: torch.Tensor  # (T,) int64
    logprobs: torch.Tensor  # (T,) float32, nats, of the policy that sampled it, at its temperature
    truncated: bool  # max_new_tokens came before EOS


# ---- inputs ------------------------------------------------------------------------------------


class PositionIndex(omni.Qwen2_5OmniPreTrainedModelForConditionalGeneration):
    """The model's own `get_rope_index` without the model, so that decode threads can call it."""

    def __init__(self, config):
        super().__init__(config)
        self.spatial_merge_size = config.vision_config.spatial_merge_size


class InputBuilder:
    """
    A row -> Prompt, by the backbone's processor; safe to call from several threads.

    raises  data.BadRow     the row's media cannot be used, or the prompt is too long
    """

    def __init__(self, folder, recipe, root, audio_captions):
        self.processor = Qwen2_5OmniProcessor.from_pretrained(base_folder(folder))
        self.in_thread = threading.local()  # a fast tokenizer must not be called by two threads at once
        config = AutoConfig.from_pretrained(base_folder(folder))
        self.config = getattr(config, "thinker_config", config)
        self.position_index = PositionIndex(self.config)
        self.recipe, self.root, self.audio_captions = recipe, Path(root), audio_captions
        self.tokenizer = self.processor.tokenizer
        ends = [self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])]
        self.eos_ids = sorted({e for e in ends if e is not None})

    def __call__(self, row, hint=None):
        return self.from_clip(row, data.decode_clip(row, self.root, self.recipe), hint)

    def at(self, root):
        """The same builder for rows whose media lie under another folder."""
        other = copy.copy(self)
        other.root = Path(root)
        return other

    def from_clip(self, row, clip, hint=None):
        if not hasattr(self.in_thread, "processor"):
            self.in_thread.processor = copy.deepcopy(self.processor)
        processor = self.in_thread.processor
        content = [{"type": "image"}] * len(clip.images)  # media first: it moves scores by points
        content += [{"type": "video"}] * (clip.frames is not None)
        content += [{"type": "audio"}] * (clip.audio is not None and not clip.use_audio)
        content += [{"type": "text", "text": data.question_text(row, hint, self.audio_captions)}]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": data.SYSTEM_PROMPT}]},
            {"role": "user", "content": content},
        ]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        kwargs = dict(text=text, return_tensors="pt", images_kwargs=dict(do_resize=False))
        kwargs["videos_kwargs"] = dict(do_resize=False, do_sample_frames=False, cap_pixels_per_frame=False)
        if clip.images:
            kwargs["images"] = clip.images
        if clip.frames is not None:
            kwargs["videos"] = [clip.frames]
            kwargs["videos_kwargs"]["fps"] = clip.fps  # of the frames taken: positions tell real time
        if clip.audio is not None:
            # without max_length the extractor pads every clip to 300 s
            kwargs["audio"] = [clip.audio]
            kwargs["audio_kwargs"] = dict(max_length=-(-len(clip.audio) // 160) * 160, truncation=False)
            if clip.use_audio:
                kwargs.update(load_audio_from_video=True, audio_from_video_indices=[0])
        batch = processor(**kwargs)
        num_tokens = batch["input_ids"].shape[1]
        if num_tokens > self.recipe.max_prompt_tokens:
            raise data.BadRow(
                f"row {row['prompt_id']}: {num_tokens} prompt tokens, over --max-prompt-tokens "
                f"{self.recipe.max_prompt_tokens}: lower --max-frames or --max-pixels, or set start and end"
            )
        return self.to_prompt(batch, clip.use_audio)

    def to_prompt(self, batch, use_audio):
        input_ids, media, mel_lengths = batch["input_ids"], {}, None
        if "pixel_values" in batch:
            media["image"] = dict(pixels=batch["pixel_values"], grid=batch["image_grid_thw"])
        if "pixel_values_videos" in batch:
            media["video"] = dict(pixels=batch["pixel_values_videos"], grid=batch["video_grid_thw"])
        if "input_features" in batch:
            mel_lengths = batch["feature_attention_mask"].sum(1)
            media["audio"] = dict(mel=batch["input_features"][0, :, : mel_lengths[0]].clone())  # trim the padding
        seconds = batch.get("video_second_per_grid")
        position_ids, _ = self.position_index.get_rope_index(
            input_ids,
            image_grid_thw=batch.get("image_grid_thw"),
            video_grid_thw=batch.get("video_grid_thw"),
            attention_mask=torch.ones_like(input_ids),
            use_audio_in_video=use_audio,
            audio_seqlens=mel_lengths,
            second_per_grids=None if seconds is None else torch.as_tensor(seconds),
        )
        return Prompt(input_ids[0], position_ids[:, 0].clone(), media)


def base_folder(folder):
    """The folder with the processor and full weights: an adapter's base, or the folder itself."""
    adapter = Path(folder) / "adapter_config.json"
    if adapter.is_file() and not (Path(folder) / "preprocessor_config.json").is_file():
        return json.loads(adapter.read_text())["base_model_name_or_path"]
    return str(folder)


# ---- attention ---------------------------------------------------------------------------------


class PackedAttention:
    """
    Attention of a packed row. With `record`, the prompts' keys and values of every layer are kept.

    groups   list of (start of the prompt in the row, P, lengths of the completions behind it)
    """

    def __init__(self, groups, device, record=False):
        self.groups, self.kept, self.masks, self.record = groups, {}, [], record
        for _, num_prompt, lengths in groups:
            # (sum of lengths, P + sum of lengths): the prompt, and its own completion up to itself
            owner = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, dtype=torch.long, device=device))  # fmt: skip
            own = (owner[:, None] == owner[None, :]).tril()
            self.masks.append(F.pad(own, (num_prompt, 0), value=True))

    def attend(self, layer, q, k, v, scaling):
        """q (1, H, L, E), k and v (1, K, L, E) -> (1, L, H, E)"""
        if self.record:
            self.kept[layer] = (k, v)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (1, H, L, E)
        pieces = []
        sizes = [num_prompt + sum(lengths) for _, num_prompt, lengths in self.groups]
        # split, not slices: the backward of a slice is as long as the whole row
        for group, q, k, v, mask in zip(self.groups, *(x.split(sizes, dim=2) for x in (q, k, v)), self.masks):
            (q, q_own), (k_prompt, _), (v_prompt, _) = (x.split([group[1], x.shape[2] - group[1]], dim=2) for x in (q, k, v))
            pieces.append(F.scaled_dot_product_attention(q, k_prompt, v_prompt, is_causal=True, scale=scaling))
            if q_own.shape[2]:
                pieces.append(F.scaled_dot_product_attention(q_own, k, v, attn_mask=mask, scale=scaling))
        return torch.cat(pieces, dim=2).transpose(1, 2)


class DecodeAttention:
    """
    Attention of one new token for G completions of each of B prompts. The prompt's keys are read
    where they are, by all its completions at once: no copy per completion.

    prompt_kv   layer -> (k, v), each (B, K, P, E), padded; prompt_mask (B, P) says what is real
    own_kv      layer -> (k, v), each (B * G, K, room, E), filled up to `length`
    """

    def __init__(self, prompt_kv, prompt_mask, group_size):
        self.prompt_kv, self.group_size, self.own_kv, self.length = prompt_kv, group_size, {}, 0
        self.bias = torch.zeros(prompt_mask.shape, device=prompt_mask.device).masked_fill(~prompt_mask, -torch.inf)

    def attend(self, layer, q, k, v, scaling):
        """q (B * G, H, 1, E), k and v (B * G, K, 1, E) -> (B * G, 1, H, E)"""
        rows, num_heads, _, width = q.shape
        own_k, own_v = self._append(layer, k, v)  # (B * G, K, length + 1, E)
        prompt_k, prompt_v = self.prompt_kv[layer]  # (B, K, P, E)
        num_prompts, num_kv, num_prompt_tokens, _ = prompt_k.shape
        share = num_heads // num_kv  # heads that share one key: with G, the rows of one matrix product
        q_own = q.view(rows, num_kv, share, width)
        q_prompt = q_own.view(num_prompts, -1, num_kv, share, width).transpose(1, 2).reshape(num_prompts, num_kv, -1, width)
        to_prompt = (q_prompt @ prompt_k.transpose(2, 3)).float() * scaling + self.bias[:, None, None]
        to_own = (q_own @ own_k.transpose(2, 3)).float() * scaling  # (B * G, K, share, length + 1)

        def by_row(x):  # (B, K, G * share, X) -> (B * G, K, share, X)
            return x.view(num_prompts, num_kv, -1, share, x.shape[-1]).transpose(1, 2).reshape(rows, num_kv, share, -1)

        def by_prompt(x):
            return x.view(num_prompts, -1, num_kv, share, x.shape[-1]).transpose(1, 2).reshape(num_prompts, num_kv, -1, x.shape[-1])

        weights = torch.cat([by_row(to_prompt), to_own], dim=-1).softmax(-1).to(q.dtype)
        out = weights[..., num_prompt_tokens:] @ own_v
        out = out + by_row(by_prompt(weights[..., :num_prompt_tokens]) @ prompt_v)
        return out.reshape(rows, 1, num_heads, width)

    def _append(self, layer, k, v):
        if layer not in self.own_kv or self.own_kv[layer][0].shape[2] == self.length:
            room = [F.pad(x, (0, 0, 0, max(64, self.length))) for x in self.own_kv.get(layer, (k[:, :, :0], v[:, :, :0]))]
            self.own_kv[layer] = tuple(room)
        for store, new in zip(self.own_kv[layer], (k, v)):
            store[:, :, self.length] = new[:, :, 0]
        return (store[:, :, : self.length + 1] for store in self.own_kv[layer])

    def keep(self, prompts, rows, group_size):
        """Only these prompts (index tensor) and rows (index tensor, group_size a prompt) go on."""
        self.prompt_kv = {i: (k[prompts], v[prompts]) for i, (k, v) in self.prompt_kv.items()}
        self.own_kv = {i: (k[rows], v[rows]) for i, (k, v) in self.own_kv.items()}
        self.bias, self.group_size = self.bias[prompts], group_size


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, shared, **_):
    """What the text layers call: `shared` is a PackedAttention or a DecodeAttention."""
    return shared.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


# ---- policy ------------------------------------------------------------------------------------


class Policy(nn.Module):
    """
    The thinker behind one forward, so that FSDP's hooks see every use of it.

    `model` is the thinker, or PEFT's wrapper around it; the properties look inside.
    """

    def __init__(self, model, train_towers):
        super().__init__()
        self.model, self.train_towers = model, train_towers

    @property
    def thinker(self):
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def towers(self):
        return [self.thinker.model.visual, self.thinker.model.audio_tower]

    @property
    def device(self):
        return next(self.parameters()).device

    def reference(self):
        """A context in which a LoRA policy is its frozen base."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()

    def encode(self, prompts):
        """
        The towers' outputs, each tower run once for all prompts.

        returns  list, a prompt each, of modality -> (n, D); what was encoded before passes through
        """
        core, out = self.thinker.model, [dict(p.media) for p in prompts]
        if self.train_towers and dist.is_initialized():
            # sharded towers: a rank that skips one would leave the others waiting in its collectives
            out.append(dict(video=dict(pixels=torch.zeros(4, 1176), grid=torch.tensor([[1, 2, 2]])), audio=dict(mel=torch.zeros(128, 200))))  # fmt: skip
        seen = [(o, m) for o in out for m in ("image", "video") if isinstance(o.get(m), dict)]
        heard = [o for o in out if isinstance(o.get("audio"), dict)]
        if seen:
            pixels = torch.cat([o[m]["pixels"] for o, m in seen]).to(self.device)
            grid = torch.cat([o[m]["grid"] for o, m in seen]).to(self.device)
            pieces = list(core.get_video_features(pixels, grid, return_dict=True).pooler_output)
            for o, m in seen:
                o[m] = torch.cat([pieces.pop(0) for _ in o[m]["grid"]])
        if heard:
            lengths = torch.tensor([o["audio"]["mel"].shape[1] for o in heard])
            mels = pad_sequence([o["audio"]["mel"].T for o in heard], batch_first=True).transpose(1, 2)
            mask = (torch.arange(mels.shape[2]) < lengths[:, None]).long()
            sound = core.get_audio_features(mels.to(self.device), mask.to(self.device), return_dict=True).last_hidden_state
            sizes = (((lengths - 1) // 2 + 1 - 2) // 2 + 1).tolist()
            for o, piece in zip(heard, sound.split(sizes)):
                o["audio"] = piece
        return out

    def embed(self, prompts):
        """-> the prompts' embeddings, media in their places: a list of (P, D)."""
        ids = torch.cat([p.input_ids for p in prompts]).to(self.device)
        embeds = self.thinker.get_input_embeddings()(ids)
        features = self.encode(prompts)
        for unused in features[len(prompts) :]:
            embeds = embeds + 0 * sum(f.sum() for f in unused.values())  # into the backward pass, without effect
        for modality in ("image", "video", "audio"):
            found = [f[modality] for f in features[: len(prompts)] if modality in f]
            if found:
                where = ids == getattr(self.thinker.config, f"{modality}_token_id")
                found = torch.cat([f.to(embeds) for f in found])
                # one placeholder too few is no error in the model: features would shift by one
                assert where.sum() == len(found), f"{modality}: {where.sum()} placeholders, {len(found)} features"
                embeds = embeds.masked_scatter(where[:, None], found)
        return embeds.split([len(p.input_ids) for p in prompts])

    def forward(self, task, *args):
        """task(policy, *args), with the parameters in place."""
        return task(self, *args)

    def read(self, embeds, position_ids, shared):
        """embeds (L, D), position_ids (3, L) -> hidden states (L, D)."""
        text = self.thinker.model.language_model
        out = text(inputs_embeds=embeds[None], position_ids=position_ids[:, None].to(embeds.device), use_cache=False, shared=shared)
        return out.last_hidden_state[0]


def head_logprobs(lm_head, hidden, targets, temperature):
    """
    hidden (n, D), targets (n,) -> log-probs (n,), entropy (n,) without gradient; both float32.

    In chunks, each recomputed in the backward pass: (n, V) logits never exist.
    """

    def chunk_logprobs(h, t):
        logits = lm_head(h).float() / temperature
        norm = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = norm - (logits.softmax(-1) * logits).sum(-1)
        return logits.gather(-1, t[:, None])[:, 0] - norm, entropy

    if len(hidden) <= HEAD_CHUNK:
        return chunk_logprobs(hidden, targets)
    chunks = [
        torch.utils.checkpoint.checkpoint(chunk_logprobs, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
    ]
    return tuple(torch.cat(parts) for parts in zip(*chunks))


def completion_logprobs(policy, prompts, completions, temperature):
    """
    log pi(c_t | prompt, c_<t) at the sampling temperature, over the whole vocabulary.

    prompts      list of Prompt
    completions  list, a prompt each, of lists of (T,) int64
    temperature  float > 0
    returns      logprobs (N, T) float32, 0 off the mask; completion_mask (N, T) bool;
                 entropy (N, T) float32 without gradient; completions in reading order
    """
    return policy(_packed_logprobs, prompts, completions, temperature)


def _packed_logprobs(policy, prompts, completions, temperature):
    device = policy.device
    embeds, positions, groups, gather, row = [], [], [], [], 0
    flat = [c for group in completions for c in group]
    # the last token of a completion predicts nothing, so it is not read
    tails = policy.thinker.get_input_embeddings()(torch.cat([c[:-1] for c in flat]).to(device))
    tails = iter(tails.split([len(c) - 1 for c in flat]))
    for prompt, embed, group in zip(prompts, policy.embed(prompts), completions):
        num_prompt, last = len(prompt.input_ids), prompt.position_ids.max()
        groups.append((row, num_prompt, [len(c) - 1 for c in group]))
        embeds.append(embed)
        positions.append(prompt.position_ids)
        end = row + num_prompt
        for completion in group:
            steps = len(completion) - 1
            # the prompt's last token predicts the first token of every completion
            gather.append(torch.cat([torch.tensor([row + num_prompt - 1]), torch.arange(end, end + steps)]))
            embeds.append(next(tails))
            positions.append((last + 1 + torch.arange(steps)).expand(3, -1))
            end += steps
        row = end
    hidden = policy.read(torch.cat(embeds), torch.cat(positions, dim=1), PackedAttention(groups, device))
    hidden = hidden[torch.cat(gather).to(device)]  # (sum of T, D)
    logprobs, entropy = head_logprobs(policy.thinker.lm_head, hidden, torch.cat(flat).to(device), temperature)
    sizes = [len(c) for c in flat]
    mask = pad_sequence([torch.ones(n, dtype=torch.bool) for n in sizes], batch_first=True).to(device)
    logprobs, entropy = (pad_sequence(x.split(sizes), batch_first=True) for x in (logprobs, entropy))
    return logprobs, mask, entropy


def micro_batches(sizes, max_tokens):
    """Indices of items, in order, in packs of at most max_tokens (an item over it gets its own)."""
    packs, room = [], -1
    for i, size in enumerate(sizes):
        if size > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(i)
        room -= size
    return packs


# ---- rollout -----------------------------------------------------------------------------------


@torch.no_grad()
def rollout(policy, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds):
    """
    Samples completions of all prompts together and records their log-probs.

    prompts          list of B Prompt
    num_completions  list of B int
    temperature      float      0 = greedy (log-probs are then those at temperature 1)
    max_new_tokens   int
    eos_ids          list of int    any of them ends a completion and belongs to it
    seeds            list of B int  one a prompt: what a prompt gets does not depend on its neighbours
    returns          list of B lists of Completion

    Nothing is truncated (no top-k, no top-p): the recorded log-probs are those of the full
    distribution that was sampled, which is what `completion_logprobs` recomputes.
    """
    return policy(_rollout, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds)


def _rollout(policy, prompts, num_completions, temperature, max_new_tokens, eos_ids, seeds):
    device, group_size, num_prompts = policy.device, max(num_completions), len(prompts)
    lengths = [len(p.input_ids) for p in prompts]
    with gathered(policy):
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        packed = PackedAttention([(s, n, []) for s, n in zip(starts, lengths)], device, record=True)
        hidden = policy.read(
            torch.cat(policy.embed(prompts)), torch.cat([p.position_ids for p in prompts], dim=1), packed
        )
        logits = policy.thinker.lm_head(hidden[torch.tensor(lengths).cumsum(0).to(device) - 1]).float()  # (B, V)
        split = lambda x: pad_sequence(x[0].transpose(0, 1).split(lengths), batch_first=True).transpose(1, 2)  # noqa: E731
        cache = {i: tuple(split(x).contiguous() for x in kv) for i, kv in packed.kept.items()}  # (B, K, P, E)
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        attention = DecodeAttention(cache, mask, group_size)

        noise = torch.stack([  # (B, G, T): all randomness of the rollout, drawn before it
            torch.rand(group_size, max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in seeds
        ]).to(device)  # fmt: skip
        position = torch.tensor([int(p.position_ids.max()) + 1 for p in prompts], device=device)
        logits = logits.repeat_interleave(group_size, dim=0)  # (B * G, V)
        ends = torch.tensor(eos_ids, device=device)
        wanted = torch.arange(group_size) < torch.tensor(num_completions)[:, None]  # (B, G)
        # slot[r] = which of the B * G completions row r is making, -1 for a row kept only to fill up
        slot = torch.arange(num_prompts * group_size).view(num_prompts, group_size).masked_fill(~wanted, -1).flatten().to(device)
        ids = torch.zeros(num_prompts * group_size, max_new_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(ids.shape, device=device)
        length = torch.zeros(len(ids), dtype=torch.long, device=device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
        noise = noise.view(-1, max_new_tokens)
        prompt_of = torch.arange(num_prompts, device=device)
        for step in range(max_new_tokens):
            token, logprob = sample(logits, temperature, noise[slot.clamp(min=0), step])
            alive = slot >= 0
            live = slot[alive]
            ids[live, step], logprobs[live, step], length[live] = token[alive], logprob[alive], step + 1
            done = alive & torch.isin(token, ends)
            ended[slot[done]] = True
            slot = slot.masked_fill(done, -1)
            num_alive = int((slot >= 0).sum())
            if num_alive == 0 or step + 1 == max_new_tokens:
                break
            rows = torch.arange(len(slot), device=device)
            if num_alive <= 0.75 * len(slot):  # finished rows leave
                by_prompt = (slot >= 0).view(-1, attention.group_size)
                prompts_left = by_prompt.any(1).nonzero()[:, 0]
                new_size = int(by_prompt.sum(1).max())
                if len(prompts_left) * new_size < len(slot):
                    first = by_prompt[prompts_left].int().argsort(dim=1, descending=True, stable=True)[:, :new_size]
                    rows = (prompts_left[:, None] * attention.group_size + first).flatten()
                    attention.keep(prompts_left, rows, new_size)
                    slot, token, prompt_of = slot[rows], token[rows], prompt_of[prompts_left]
            embeds = policy.thinker.get_input_embeddings()(token[:, None])  # (rows, 1, D)
            place = (position[prompt_of] + step).repeat_interleave(attention.group_size)
            out = policy.thinker.model.language_model(
                inputs_embeds=embeds, position_ids=place[None, :, None].expand(3, -1, 1), use_cache=False, shared=attention
            )
            attention.length += 1
            logits = policy.thinker.lm_head(out.last_hidden_state[:, -1]).float()
    ids, logprobs, length, ended = ids.cpu(), logprobs.cpu(), length.tolist(), ended.tolist()
    return [
        [
            Completion(ids[r, : length[r]].clone(), logprobs[r, : length[r]].clone(), not ended[r])
            for r in range(b * group_size, b * group_size + num_completions[b])
        ]
        for b in range(num_prompts)
    ]


def sample(logits, temperature, noise):
    """logits (n, V), noise (n,) in [0, 1) -> token (n,), its log-prob (n,), by the inverse of the CDF."""
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cdf = logprobs.double().exp().cumsum(-1)  # float32 would lose the tail of a large vocabulary
        token = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


# ---- load, shard, save -------------------------------------------------------------------------


def load(folder, lora_rank, train_towers, gradient_checkpointing):
    """
    A thinker from a hub id or folder (a full Omni checkpoint, a thinker, or a PEFT adapter).

    lora_rank     int     0 = every weight of the text model trains
    train_towers  bool    whether the vision and audio towers train too
    raises        FileNotFoundError     no such folder and no such model on the hub
    """
    adapter = (Path(folder) / "adapter_config.json").is_file()
    try:
        thinker = Thinker.from_pretrained(base_folder(folder), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no Qwen2.5-Omni model at {folder}: {str(error).splitlines()[0]}") from None
    thinker.model.language_model.set_attn_implementation("shared_prefix")
    model = thinker
    if adapter:  # a trained adapter becomes part of the weights; what trains now is new
        from peft import PeftModel

        model = thinker = PeftModel.from_pretrained(thinker, folder).merge_and_unload()
    for tower in (thinker.model.visual, thinker.model.audio_tower):
        tower.requires_grad_(train_towers)
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        target = rf".*language_model\.layers\.\d+\..*\.({TEXT_LAYERS})"
        if train_towers:
            target += rf"|.*(visual|audio_tower)\..*\.({TOWER_LAYERS})"
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=target, lora_dropout=0.0)
        model = get_peft_model(thinker, config, autocast_adapter_dtype=False)
    if gradient_checkpointing:
        thinker.gradient_checkpointing_enable(dict(use_reentrant=False))
    return Policy(model, train_towers).train()


def shard(policy, mesh, param_dtype):
    """
    FSDP2: one unit a decoder layer (and a tower layer if towers train), the rest in the root.

    Frozen towers stay whole on every rank, outside FSDP: a rank whose prompts have no audio or no
    video then simply does not call them, and nobody waits.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    units = [omni.Qwen2_5OmniDecoderLayer]
    ignored = set()
    if policy.train_towers:
        units += [omni.Qwen2_5OmniVisionBlock, omni.Qwen2_5OmniAudioEncoderLayer]
    else:
        ignored = {p for tower in policy.towers for p in tower.parameters()}
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in policy.modules():
        if isinstance(module, tuple(units)):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    return fully_shard(policy, mesh=mesh, mp_policy=precision, ignored_params=ignored)


@contextmanager
def gathered(policy):
    """
    Under FSDP, the layers whole from here to the end: gathered once a rollout, not once a token.
    To be used inside the policy's forward, which does the same for the root unit. Nothing else
    in a rollout talks to other ranks, so each ends in its own time.
    """
    units = [m for m in policy.modules() if hasattr(m, "unshard") and m is not policy]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def save(policy, folder, processor, is_main):
    """A standard folder that `from_pretrained` loads: thinker and processor, or a PEFT adapter."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_main:
        state = {re.sub(r"^model\.", "", k, count=1): v for k, v in state.items()}
        policy.model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)
