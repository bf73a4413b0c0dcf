"""
The policy: a backbone (qwen.py, ola.py) behind one forward; log-probs of completions; load, shard, save.

A group is one prompt and its completions. Nothing about a prompt is done twice: its clip is encoded
once, it is read once for all its completions, in the rollout and in the update, and many groups
stand in one packed row without padding (attention.py).

L packed tokens, P prompt tokens, N completions, T completion tokens, D width, V vocabulary.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.utils.logging import disable_progress_bar

from run.folders import from_pretrained, is_adapter  # before torch
from run.sharding import place
from omni.attention import PackedAttention, shared_prefix_attention
from omni.inputs import BACKBONES, InputBuilder, Prompt, config_of  # noqa: F401
from omni.rollout import Completion, rollout  # noqa: F401  part of what this file offers

disable_progress_bar()
AttentionInterface.register("shared_prefix", shared_prefix_attention)
HEAD_CHUNK = 1024  # tokens whose logits exist at one time
SMALL = 10**8  # weights, above which activations are computed again: less memory for more time


# ---- policy ------------------------------------------------------------------------------------


class Policy(nn.Module):
    """
    The thinker behind one forward, so that FSDP's hooks see every use of it.

    `model` is the thinker, or PEFT's wrapper around it; the properties look inside.
    """

    def __init__(self, model, train_towers):
        super().__init__()
        self.model, self.train_towers = model, train_towers
        self.thinker.model.language_model.set_attn_implementation("shared_prefix")

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
        lora = hasattr(self.model, "disable_adapter")
        return self.model.disable_adapter() if lora else nullcontext()

    def encode(self, prompts):
        """The towers' outputs: a list, a prompt each, of modality -> (n, D)."""
        return self.backbone.encode(self.thinker.model, prompts, self.device, self.train_towers)

    @torch.no_grad()
    def encoded(self, prompt):
        """The prompt with the outputs of frozen towers, which never change, for its media."""
        media = self.encode([prompt])[0]
        return prompt._replace(media={name: value.cpu() for name, value in media.items()})

    def embed(self, prompts):
        """-> the prompts' embeddings, media in their places: a list of (P, D)."""
        ids = torch.cat([p.input_ids for p in prompts]).to(self.device)
        embeds = self.thinker.get_input_embeddings()(ids)
        features = self.encode(prompts)
        for unused in features[len(prompts) :]:
            # into the backward pass, without effect
            embeds = embeds + 0 * sum(f.sum() for f in unused.values())
        for modality in ("image", "video", "audio"):
            found = [f[modality] for f in features[: len(prompts)] if modality in f]
            if found:
                where = ids == getattr(self.thinker.config, f"{modality}_token_id")
                found = torch.cat([f.to(embeds) for f in found])
                # one placeholder too few is no error in the model: features would shift by one
                num_places = int(where.sum())
                told = f"{modality}: {num_places} placeholders, {len(found)} features"
                assert num_places == len(found), told
                embeds = embeds.masked_scatter(where[:, None], found)
        return embeds.split([len(p.input_ids) for p in prompts])

    def forward(self, task):
        """
        task(policy), with the parameters in place. Nothing else is passed: on a GPU, FSDP moves every
        tensor among its module's arguments there, and copies the dicts that hold them.
        """
        return task(self)

    def read(self, embeds, position_ids, shared):
        """embeds (L, D), position_ids (3, L) -> hidden states (L, D)."""
        text = self.thinker.model.language_model
        position_ids = position_ids[:, None].to(embeds.device)
        inputs = dict(inputs_embeds=embeds[None], position_ids=position_ids)
        return text(**inputs, use_cache=False, shared=shared).last_hidden_state[0]


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
    device = policy.device
    embeds, positions, groups, gather, row = [], [], [], [], 0
    flat = [c for group in completions for c in group]
    # the last token of a completion predicts nothing, so it is not read
    tails = policy.thinker.get_input_embeddings()(torch.cat([c[:-1] for c in flat]).to(device))
    tails = iter(tails.split([len(c) - 1 for c in flat]))
    for prompt, embed, group in zip(prompts, policy.embed(prompts), completions):
        num_prompt, last = len(prompt.input_ids), int(prompt.position_ids.max())
        groups.append((num_prompt, [len(c) - 1 for c in group]))
        embeds.append(embed)
        positions.append(prompt.position_ids)
        end = row + num_prompt
        for completion in group:
            steps = len(completion) - 1
            # the prompt's last token predicts the first token of every completion
            reads = torch.arange(end - 1, end + steps)
            reads[0] = row + num_prompt - 1
            gather.append(reads)
            embeds.append(next(tails))
            own = last + 1 + torch.arange(steps, device=prompt.position_ids.device)
            positions.append(own.expand(3, -1))
            end += steps
        row = end
    packed = PackedAttention(groups, device)
    hidden = policy.read(torch.cat(embeds), torch.cat(positions, dim=1), packed)
    hidden = hidden[torch.cat(gather).to(device)]  # (sum of T, D)
    head, targets, sizes = policy.thinker.lm_head, torch.cat(flat).to(device), list(map(len, flat))
    found = head_logprobs(head, hidden, targets, temperature)
    logprobs, entropy = (pad_sequence(x.split(sizes), batch_first=True) for x in found)
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).to(device)
    return logprobs, mask, entropy


# ---- load, shard, save -------------------------------------------------------------------------


def open_policies(folder, args, device, with_reference):
    """
    -> the policy to train, and the frozen one that the KL is to, None where none of its own is needed:
    with LoRA it is the policy without its adapter                                          [U15]
    """
    reference = None
    if with_reference and not args.lora_rank:
        reference = load(folder, 0, args.train_towers).requires_grad_(False)
        reference = place(reference, device, args.dtype)
    policy = load(folder, args.lora_rank, args.train_towers)
    return place(policy, device, args.dtype), reference


def load(folder, lora_rank, train_towers):
    """
    A thinker from a hub id or folder (a full Omni checkpoint, a thinker, or a PEFT adapter).

    lora_rank     int     0 = every weight of the text model trains
    train_towers  bool    whether the vision and audio towers train too
    raises        FileNotFoundError     no such folder and no such model on the hub
    """
    backbone = BACKBONES[config_of(folder).model_type]
    thinker = from_pretrained(backbone.Thinker, folder, dtype=torch.float32)
    if is_adapter(folder):  # a trained adapter becomes part of the weights; what trains now is new
        from peft import PeftModel

        thinker = PeftModel.from_pretrained(thinker, folder).merge_and_unload()
        thinker.requires_grad_(True)  # PEFT had frozen them
    return prepare(thinker, lora_rank, train_towers)


def prepare(thinker, lora_rank, train_towers):
    """A thinker -> the policy to train: what is frozen frozen, a new adapter in its place."""
    policy = Policy(thinker, train_towers)
    for module in policy.frozen:
        module.requires_grad_(False)
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        target = rf".*language_model\.layers\.\d+\..*\.({policy.backbone.TEXT_LAYERS})"
        target += rf"|.*({policy.backbone.TOWER_LAYERS})" * train_towers
        kwargs = dict(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0)  # [D2]
        config = LoraConfig(target_modules=target, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same new adapter on every rank, and after every restart
            policy.model = get_peft_model(thinker, config, autocast_adapter_dtype=False)
    if sum(p.numel() for p in thinker.parameters()) > SMALL:
        kwargs = dict(use_reentrant=False, preserve_rng_state=False)  # there is no dropout
        thinker.activation_checkpointing_enable(kwargs)
    return policy.train()


def write_merged(folder, part):
    """Writes a trained adapter and its base as one model."""
    merged = load(folder, lora_rank=0, train_towers=False)
    merged.thinker.save_pretrained(part)
    from_pretrained(merged.backbone.Processor, folder).save_pretrained(part)
