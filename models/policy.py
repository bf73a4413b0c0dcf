"""
The policy: a backbone (qwen.py, ola.py) behind one forward; log-probs of completions; load, shard, save.

A group is one prompt and its completions. Nothing about a prompt is done twice: its clip is encoded
once, it is read once for all its completions, in the rollout and in the update, and many groups
stand in one packed row without padding (attention.py).

L packed tokens, P prompt tokens, N completions, T completion tokens, D width, V vocabulary.
"""

from contextlib import nullcontext
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.utils.logging import disable_progress_bar

from models.attention import PackedAttention, shared_prefix_attention, window_attention
from models.inputs import BACKBONES, positions_after
from models.sharding import on_host
from run.errors import out_of_memory_advice

disable_progress_bar()
AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionInterface.register("flash_windows", window_attention)  # towers, on a GPU
HEAD_CHUNK = 1024  # tokens whose logits exist at one time
CHECKPOINT_ABOVE_PARAMS = (
    10**8
)  # weights, above which activations are computed again: less memory for more time


class Head(NamedTuple):
    """
    A prompt, or what it begins with, as the text model takes it.

    Some vision towers also give features of K of their middle layers (deepstack): the text model adds
    them after each of its first K layers, where the pictures stand.
    """

    embeds: torch.Tensor  # (P, D)
    position_ids: torch.Tensor  # (3, P)
    visual: torch.Tensor  # (P,) bool: where pictures and frames stand
    deepstack: torch.Tensor  # (visual.sum(), K D), in the order of the tokens; K is 0 without any

    def first(self, n):
        """Its first n tokens, with all media among them."""
        return self._replace(
            embeds=self.embeds[:n],
            position_ids=self.position_ids[:, :n],
            visual=self.visual[:n],
        )


class Policy(nn.Module):
    """
    The thinker behind one forward, so that FSDP's hooks see every use of it.

    `model` is the thinker, or PEFT's wrapper around it; the properties look inside.
    """

    def __init__(self, model, train_towers):
        super().__init__()
        self.model, self.train_towers = model, train_towers
        text = self.thinker.model.language_model
        text.set_attn_implementation("shared_prefix")
        text.layers[-1].forward = MethodType(last_layer_predicting_only, text.layers[-1])

    @property
    def thinker(self):
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self):
        return BACKBONES[self.thinker.config.model_type]

    @property
    def units(self):
        return self.backbone.TEXT_UNITS + self.backbone.TOWER_UNITS * self.train_towers

    @property
    def towers(self):
        return [self.thinker.model.visual, self.thinker.model.audio_tower]

    @property
    def frozen(self):
        """Modules in which nothing trains."""
        never = [self.thinker.model.get_submodule(name) for name in self.backbone.FROZEN]
        return never if self.train_towers else self.towers

    @property
    def device(self):
        return next(self.parameters()).device

    def reference(self):
        """A context in which a LoRA policy is its frozen base."""
        return (
            self.model.disable_adapter()
            if hasattr(self.model, "disable_adapter")
            else nullcontext()
        )

    def encode(self, prompts):
        """
        The towers' outputs: a list, a prompt each, of modality -> (n, D). Of all prompts at once if the
        towers train, else a prompt at a time: the clips of a batch at once can be 100 GB.
        """
        batches = [prompts] if self.train_towers else [[prompt] for prompt in prompts]
        encode, given = self.backbone.encode, (self.device, self.train_towers)
        return [media for b in batches for media in encode(self.thinker.model, b, *given)]

    @out_of_memory_advice("the towers: lower --max-frames or --max-pixels")
    @torch.no_grad()
    def encoded(self, prompt):
        """The prompt with the outputs of frozen towers, which never change, for its media."""
        media = self.encode([prompt])[0]
        return prompt._replace(media={name: on_host(value) for name, value in media.items()})

    def embed(self, prompts):
        """-> a Head for each prompt, media in their places."""
        config, sizes = self.thinker.config, [len(p.input_ids) for p in prompts]
        ids = torch.cat([p.input_ids for p in prompts])
        visual = (ids == config.image_token_id) | (ids == config.video_token_id)
        num_visual = [int(v.sum()) for v in visual.split(sizes)]  # on the host: nobody waits
        ids, visual = ids.to(self.device), visual.to(self.device)
        embeds = self.thinker.get_input_embeddings()(ids)
        width = embeds.shape[1]
        features = self.encode(prompts)
        for unused in features[len(prompts) :]:
            # every rank goes back through them
            embeds = embeds + 0 * sum(f.sum() for f in unused.values())
        deepstack = embeds.new_zeros(sum(num_visual), 0)
        for modality in ("image", "video", "audio"):
            found = [f[modality] for f in features[: len(prompts)] if modality in f]
            if found:
                where = ids == getattr(config, f"{modality}_token_id")
                found = torch.cat([f.to(embeds, non_blocking=True) for f in found])
                # one placeholder too few is no error in the model: features would shift by one
                assert (n := int(where.sum())) == len(found), (
                    f"{modality}: {n} placeholders of {len(found)}"
                )
                embeds = embeds.masked_scatter(where[:, None], found[:, :width])
                if found.shape[1] > width:  # those of the tower's middle layers stand beside them
                    layers = found[:, width:]
                    if not deepstack.shape[1]:
                        deepstack = layers.new_zeros(sum(num_visual), layers.shape[1])
                    deepstack = deepstack.masked_scatter(where[visual][:, None], layers)
        parts = zip(
            embeds.split(sizes),
            [p.position_ids for p in prompts],
            visual.split(sizes),
            deepstack.split(num_visual),
        )
        return [Head(*part) for part in parts]

    def forward(self, task):
        """
        task(policy), with the parameters in place. Nothing else is passed: on a GPU, FSDP moves every
        tensor among its module's arguments there, and copies the dicts that hold them.
        """
        return task(self)

    def read(self, heads, tails, record=False):
        """
        One packed row [ head 1 | head 2 | ... | tails of head 1 | ... ]: each tail goes on from its head.

        heads    list of Head
        tails    list, a head each, of lists of (ids (n,), position_ids (3, n)), n > 0, without media
        returns  hidden states (M, D) of the last token of each head and of all tails, the PackedAttention
        """
        flat = [tail for group in tails for tail in group]
        ids = torch.cat([ids for ids, _ in flat]).to(self.device)
        embeds = torch.cat([*(h.embeds for h in heads), self.thinker.get_input_embeddings()(ids)])
        positions = [*(h.position_ids for h in heads), *(p for _, p in flat)]
        positions = torch.cat(positions, dim=1)[:, None].to(self.device)
        sizes = [len(h.embeds) for h in heads], [[len(ids) for ids, _ in group] for group in tails]
        shared = PackedAttention(*sizes, self.device, record)
        inputs = dict(inputs_embeds=embeds[None], position_ids=positions, use_cache=False)
        width = embeds.shape[1]
        deepstack = [h.deepstack for h in heads if h.deepstack.shape[1]]
        if deepstack:
            visual = torch.cat([*(h.visual for h in heads), ids.new_zeros(len(ids)).bool()])
            inputs["visual_pos_masks"] = visual[None]
            inputs["deepstack_visual_embeds"] = torch.cat(deepstack).split(width, dim=1)
        text = self.thinker.model.language_model
        return text(**inputs, shared=shared).last_hidden_state[0], shared


def last_layer_predicting_only(layer, hidden, **given):
    """
    The text model's last layer, Qwen2's or Qwen3's: of a packed row only the tokens that predict go
    through it. Of a prompt's other tokens nothing is read but keys and values.
    hidden (1, L, D) -> (1, M, D)
    """
    shared, attn = given.get("shared"), layer.self_attn
    if not isinstance(shared, PackedAttention):
        return type(layer).forward(layer, hidden, **given)
    x, projections = layer.input_layernorm(hidden), (attn.q_proj, attn.k_proj, attn.v_proj)
    q, k, v = (p(x).unflatten(-1, (-1, attn.head_dim)) for p in projections)
    if hasattr(attn, "q_norm"):  # Qwen3
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, *given["position_embeddings"])
    out = shared.attend(attn.layer_idx, q[:, :, shared.read], k, v, attn.scaling)
    hidden = hidden[:, shared.read] + attn.o_proj(out.flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def head_logprobs(lm_head, hidden, targets, temperature):
    """
    hidden (n, D), targets (n,) -> log-probs (n,), entropy (n,) without gradient; both float32.

    In chunks, each recomputed in the backward pass: (n, V) logits never exist.
    """

    def chunk_logprobs(h, t):
        logits = lm_head(h).float()
        logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, t[:, None])[:, 0]
        with torch.no_grad():  # last: it is not computed again
            entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
        return chosen, entropy

    if len(hidden) <= HEAD_CHUNK:
        return chunk_logprobs(hidden, targets)
    pairs = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
    chunks = [checkpoint(chunk_logprobs, *pair, use_reentrant=False) for pair in pairs]
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
    return policy(lambda policy: _packed_logprobs(policy, prompts, completions, temperature))


def _packed_logprobs(policy, prompts, completions, temperature):
    flat = [c for group in completions for c in group]
    tails, gather, row = [], [], len(prompts)
    for b, (prompt, group) in enumerate(zip(prompts, completions)):
        # the last token of a completion predicts nothing, so it is not read, unless it is the only one
        read = [completion[: max(len(completion) - 1, 1)] for completion in group]
        tails.append([(ids, positions_after(prompt.position_ids, len(ids))) for ids in read])
        for completion, ids in zip(group, read):
            # the prompt's last token predicts the first token of every completion
            gather += [torch.tensor([b]), torch.arange(row, row + len(completion) - 1)]
            row += len(ids)
    hidden, _ = policy.read(policy.embed(prompts), tails)
    hidden = hidden[torch.cat(gather).to(policy.device)]  # (sum of T, D)
    targets, sizes = torch.cat(flat).to(policy.device), list(map(len, flat))
    found = head_logprobs(policy.thinker.lm_head, hidden, targets, temperature)
    logprobs, entropy = (pad_sequence(x.split(sizes), batch_first=True) for x in found)
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).to(policy.device)
    return logprobs, mask, entropy
