"""
The policy: a backbone (qwen.py, ola.py) behind one forward, and log-probs of completions.

Nothing about a prompt is done twice. Its clip is encoded once, and it is read once for all its
completions, in the rollout and in the update. Many prompts with their completions stand in one packed
row without padding (attention.py).

P prompt tokens, L tokens of a packed row, M of them that predict a token of a completion,
N completions, T completion tokens, D width.
"""

from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from models.attention import PackedAttention, shared_prefix_attention, window_attention
from models.head import head_logprobs
from models.inputs import BACKBONES, positions_after
from models.patch_embedding import use_products
from models.sharding import in_forward, on_host
from run.errors import out_of_memory_advice

AttentionInterface.register("shared_prefix", shared_prefix_attention)  # text model
AttentionInterface.register("flash_windows", window_attention)  # towers, on a GPU


class PromptEmbeds(NamedTuple):
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

    `model` is the thinker, or PEFT's wrapper around it; `thinker` looks inside.
    """

    def __init__(self, model, train_towers):
        super().__init__()
        self.model = model
        self.train_towers = train_towers
        self.expert_replay = None  # an ExpertReplay with --replay-experts
        text = self.thinker.model.language_model
        text.set_attn_implementation("shared_prefix")
        last_layer = text.layers[-1]
        last_layer.forward = MethodType(last_layer_predicting_only, last_layer)
        for module in text.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(rms_norm, module)
        for tower in self.towers:
            use_products(tower)

    # ---- parts

    @property
    def has_adapter(self):
        return hasattr(self.model, "disable_adapter")

    @property
    def thinker(self):
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def backbone(self):
        """The module qwen.py or ola.py."""
        return BACKBONES[self.thinker.config.model_type]

    @property
    def units(self):
        """Classes of the modules that FSDP gathers one at a time."""
        if self.train_towers:
            return self.backbone.TEXT_UNITS + self.backbone.TOWER_UNITS
        return self.backbone.TEXT_UNITS

    @property
    def towers(self):
        return [self.thinker.model.visual, self.thinker.model.audio_tower]

    @property
    def frozen(self):
        """Modules in which nothing trains."""
        if not self.train_towers:
            return self.towers
        return [self.thinker.model.get_submodule(name) for name in self.backbone.FROZEN]

    @property
    def float32_parts(self):
        """Modules that compute in float32, whatever the rest computes in."""
        names = self.thinker._keep_in_fp32_modules_strict or ()
        return [
            module
            for name, module in self.thinker.named_modules()
            if name.rpartition(".")[2] in names
        ]

    @property
    def device(self):
        return next(self.parameters()).device

    @contextmanager
    def reference(self):
        """A context in which a LoRA policy is the policy that its stage began with.    [U15]"""
        with ExitStack() as contexts:
            if self.has_adapter:
                from models.adapters import reference_adapter  # here: PEFT takes a second to load

                contexts.enter_context(reference_adapter(self.model))
            if self.expert_replay:
                contexts.enter_context(self.expert_replay.paused())
            yield

    # ---- media

    def encode(self, prompts):
        """The towers' outputs -> list, one per prompt, of {modality: (n, D)}"""
        # Frozen towers take one prompt at a time: the clips of a whole batch can be 100 GB. Trained ones
        # take all, so that every rank calls them once.
        batches = [prompts] if self.train_towers else [[prompt] for prompt in prompts]
        features = []
        for batch in batches:
            features += self.backbone.encode(
                self.thinker.model, batch, self.device, self.train_towers
            )
        return features

    @out_of_memory_advice("the towers: lower --max-frames or --max-pixels")
    @torch.no_grad()
    def with_encoded_media(self, prompt):
        """The prompt with the outputs of frozen towers in place of its media: they never change."""
        (features,) = self.encode([prompt])
        return prompt._replace(media={name: on_host(value) for name, value in features.items()})

    def embed(self, prompts):
        """Token embeddings of the prompts, with the features of their media in place -> list of PromptEmbeds"""
        config = self.thinker.config
        sizes = [len(prompt.input_ids) for prompt in prompts]
        ids = torch.cat([prompt.input_ids for prompt in prompts])
        visual = (ids == config.image_token_id) | (ids == config.video_token_id)
        num_visual = [int(part.sum()) for part in visual.split(sizes)]  # on the host: no wait
        ids = ids.to(self.device)
        visual = visual.to(self.device)
        embeds = self.thinker.get_input_embeddings()(ids)  # (sum of P, D)
        width = embeds.shape[1]

        features = self.encode(prompts)
        for dummy in features[len(prompts) :]:
            # of other lengths on other ranks: the backward pass goes through them on every rank
            embeds = embeds + 0 * sum(f.sum() for f in dummy.values())
        features = features[: len(prompts)]

        deepstack = embeds.new_zeros(sum(num_visual), 0)
        for modality in ("image", "video", "audio"):
            parts = [f[modality] for f in features if modality in f]
            if not parts:
                continue
            values = torch.cat([part.to(embeds, non_blocking=True) for part in parts])
            places = ids == getattr(config, f"{modality}_token_id")
            # with one placeholder too few the features would shift by one, without an error
            num_places = int(places.sum())
            assert num_places == len(values), (
                f"{modality}: {num_places} placeholders, {len(values)} features"
            )
            embeds = embeds.masked_scatter(places[:, None], values[:, :width])
            if values.shape[1] > width:  # features of the tower's middle layers stand beside them
                layers = values[:, width:]
                if not deepstack.shape[1]:
                    deepstack = layers.new_zeros(sum(num_visual), layers.shape[1])
                deepstack = deepstack.masked_scatter(places[visual][:, None], layers)

        prompt_embeds = []
        split = zip(prompts, embeds.split(sizes), visual.split(sizes), deepstack.split(num_visual))
        for prompt, embeds_one, visual_one, deepstack_one in split:
            prompt_embeds.append(
                PromptEmbeds(embeds_one, prompt.position_ids, visual_one, deepstack_one)
            )
        return prompt_embeds

    # ---- forward

    def forward(self, task):
        """
        Runs task(policy) while FSDP holds the parameters in place, and returns what it returns. See
        models/sharding.py, in_forward.
        """
        return task(self)

    def packed_forward(self, prefixes, suffixes, record=False):
        """
        Reads one packed row [ prefix 1 | prefix 2 | ... | suffixes of prefix 1 | ... ]. Each suffix
        continues its prefix. To be called inside `forward`.

        prefixes  list of PromptEmbeds
        suffixes  list, one per prefix, of lists of (ids (n,), position_ids (3, n)), n > 0, without media
        record    whether the PackedAttention keeps the keys and values of every layer
        returns   hidden states (M, D) of the last token of each prefix, then of all suffixes;
                  the PackedAttention
        """
        text = self.thinker.model.language_model
        flat_suffixes = [suffix for group in suffixes for suffix in group]
        suffix_ids = torch.cat([ids for ids, _ in flat_suffixes]).to(self.device)
        suffix_embeds = self.thinker.get_input_embeddings()(suffix_ids)
        embeds = torch.cat([*(prefix.embeds for prefix in prefixes), suffix_embeds])  # (L, D)
        positions = [prefix.position_ids for prefix in prefixes]
        positions += [position_ids for _, position_ids in flat_suffixes]
        positions = torch.cat(positions, dim=1).to(self.device)  # (3, L)

        prefix_sizes = [len(prefix.embeds) for prefix in prefixes]
        suffix_sizes = [[len(ids) for ids, _ in group] for group in suffixes]
        attention = PackedAttention(prefix_sizes, suffix_sizes, self.device, record)

        kwargs = {}
        deepstack = [prefix.deepstack for prefix in prefixes if prefix.deepstack.shape[1]]
        if deepstack:
            no_visual = torch.zeros_like(suffix_ids, dtype=torch.bool)
            visual = torch.cat([*(prefix.visual for prefix in prefixes), no_visual])
            kwargs["visual_pos_masks"] = visual[None]
            kwargs["deepstack_visual_embeds"] = torch.cat(deepstack).split(embeds.shape[1], dim=1)
        outputs = text(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None],
            use_cache=False,
            shared=attention,
            **kwargs,
        )
        return outputs.last_hidden_state[0], attention


def rms_norm(norm, x):
    """Forward of transformers' RMSNorm: on a GPU in one kernel instead of seven, rounded once."""
    if not x.is_cuda:
        return type(norm).forward(norm, x)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def last_layer_predicting_only(layer, hidden, **kwargs):
    """
    Forward of the text model's last layer (Qwen2's or Qwen3's). Only the tokens that predict one of a
    completion go through it; of the others, only keys and values are needed. That saves a fifth of an
    update of the toy with its 4 layers, a thirtieth of one with 28 (docs/speed.md).

    hidden   (1, L, D)
    returns  (1, M, D) in a packed row; (1, L, D) as the layer computes it where all tokens predict
    """
    attention = kwargs.get("shared")
    if not isinstance(attention, PackedAttention):
        return type(layer).forward(layer, hidden, **kwargs)
    self_attn = layer.self_attn
    normed = layer.input_layernorm(hidden)
    heads = (-1, self_attn.head_dim)
    q = self_attn.q_proj(normed).unflatten(-1, heads)
    k = self_attn.k_proj(normed).unflatten(-1, heads)
    v = self_attn.v_proj(normed).unflatten(-1, heads)
    if hasattr(self_attn, "q_norm"):  # Qwen3
        q = self_attn.q_norm(q)
        k = self_attn.k_norm(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (1, heads, L, E)
    q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
    q = q[:, :, attention.predicting]
    out = attention.attend(self_attn.layer_idx, q, k, v, self_attn.scaling)
    hidden = hidden[:, attention.predicting] + self_attn.o_proj(out.flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


# ---- log-probs ---------------------------------------------------------------------------------


@in_forward
def completion_logprobs(policy, prompts, completions, temperature):
    """
    log pi(c_t | prompt, c_<t) at the sampling temperature, over the whole vocabulary.

    prompts      list of Prompt
    completions  list, one per prompt, of lists of (T,) int64
    temperature  float > 0
    returns      logprobs (N, T) float32, 0 off the mask; completion_mask (N, T) bool;
                 entropy (N, T) float32 without gradient; completions in reading order
    """
    # The hidden states begin with the last token of each prompt; then come the completions' tokens.
    suffixes = []
    predictors = []  # rows of the hidden states that predict the completions' tokens, in their order
    row = len(prompts)
    for b, (prompt, group) in enumerate(zip(prompts, completions)):
        prompt_suffixes = []
        for completion in group:
            # The last token predicts nothing, so it is not read. A completion of one token is read
            # all the same: attention takes no empty sequence.
            ids = completion[: max(len(completion) - 1, 1)]
            prompt_suffixes.append((ids, positions_after(prompt.position_ids, len(ids))))
            # the prompt's last token predicts the first token, and each token predicts the next
            predictors.append(torch.tensor([b]))
            predictors.append(torch.arange(row, row + len(completion) - 1))
            row += len(ids)
        suffixes.append(prompt_suffixes)
    if policy.expert_replay:
        policy.expert_replay.impose(prompts, completions, policy.device)
    hidden, _ = policy.packed_forward(policy.embed(prompts), suffixes)
    hidden = hidden[torch.cat(predictors).to(policy.device)]  # (sum of T, D)

    flat = [completion for group in completions for completion in group]
    lengths = [len(completion) for completion in flat]
    targets = torch.cat(flat).to(policy.device)
    logprobs, entropy = head_logprobs(policy.thinker.lm_head, hidden, targets, temperature)
    logprobs = pad_sequence(logprobs.split(lengths), batch_first=True)  # (N, T)
    entropy = pad_sequence(entropy.split(lengths), batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return logprobs, mask.to(policy.device), entropy
