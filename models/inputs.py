"""
A row as a prompt of P tokens, by the backbone that a folder holds; which prompts share a clip.

To add a backbone, write one module beside qwen.py, qwen3.py and ola.py and name it in BACKBONES below.
The rest of the code asks it for nothing but this (P prompt tokens, n features of one medium, D text
width):

    MODEL_TYPES     tuple of str    `config.model_type` of its folders: whole checkpoint, thinker alone
    Thinker         class           a transformers PreTrainedModel, see below
    Processor       class           with `tokenizer`, `apply_chat_template`, `save_pretrained`
    TEXT_LAYERS     regex           last part of the names of linear layers of the text model that
                                    get a LoRA adapter: "q_proj|k_proj|..."
    TOWER_LAYERS    regex           the same for towers, matched against the end of the whole name
    EXPERTS         tuple of str    last parts of the names of parameters that hold a matrix for each
                                    expert: they get an adapter with --lora-experts; () without any
    routers, route  functions       only with experts: the modules that choose them, and their forward,
                                    for --replay-experts (models/expert_replay.py)
    TEXT_UNITS      tuple           classes of the layers that FSDP gathers one at a time
    TOWER_UNITS     tuple           the same for towers; used when towers train
    FROZEN          tuple of str    parts that never train, as names below `thinker.model`
    SIDE            int             pixels; both sides of every frame are multiples of it

    check(config, processor, folder)
        Raises UserError if the folder's configuration and processor do not belong together, or if it
        holds another model of the same kind.

    media_ends(tokenizer, config) -> list of str
        The tokens that media end with in a prompt, a sound's last. What follows the last of them is
        text only: another question about the same clip replaces it (`InputBuilder.with_text`).

    inputs(processor, config, text, clip, name) -> input_ids (P,), position_ids (3, P), media
        A clip (data/clips.py) and the text of its prompt, with one placeholder for each medium, as
        the thinker takes them. input_ids hold one placeholder token for each feature. media:
        {"image" | "video" | "audio": dict of tensors for the towers}; `encode` reads it, nothing
        else does. name: the row, for error messages. Raises BadRow for a clip it cannot take.

    encode(core, prompts, device, train_towers) -> list, a prompt each, of {modality: (n, D)}
        The towers' outputs. core: `thinker.model`. A medium that is a tensor already passes through.
        Columns beyond D, K D of them, are features of K middle layers of the tower (deepstack):
        `Policy` adds them after each of the first K text layers, where the medium stands, if the text
        model takes `visual_pos_masks` and `deepstack_visual_embeds` as transformers' Qwen3 models do.
        If towers train and there are several processes, every rank must call every tower, else FSDP
        waits for ever: encode appends dummy media, whose outputs `Policy.embed` adds with weight 0.

The thinker has `model.language_model`, whose layers call the attention "shared_prefix" of
models/attention.py and pass keyword arguments on to it; `model.visual` and `model.audio_tower`;
`lm_head`; `get_input_embeddings()`; and `config.{image,video,audio}_token_id`.
"""

import copy
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig

from data.clips import BadRow, decode_clip
from data.rows import SYSTEM_PROMPT, question_text
from hints import place_hint
from models import ola, qwen, qwen3
from models.paths import from_pretrained
from run.errors import UserError

BACKBONES = {kind: backbone for backbone in (qwen, qwen3, ola) for kind in backbone.MODEL_TYPES}


def config_of(folder):
    """The configuration of the model in a folder. Raises UserError if no backbone here takes it."""
    config = from_pretrained(AutoConfig, folder)
    config = getattr(config, "thinker_config", config)
    if config.model_type not in BACKBONES:
        raise UserError(
            f"{folder} is a {config.model_type} model: give Qwen2.5-Omni, Qwen3-Omni, or Ola as "
            "`python -m models.ola convert` writes it"
        )
    return config


class Prompt(NamedTuple):
    """One prompt as the model takes it. Media are tensors for the towers, or their outputs."""

    input_ids: torch.Tensor  # (P,) int64, media placeholders filled in
    # (3, P) TMRoPE time, height, width; plain ones: all equal. int64, or float32 where a backbone's
    # times lie between whole numbers
    position_ids: torch.Tensor
    media: dict  # modality -> the tower's input (dict of tensors), or its output (n, D)

    @property
    def is_encoded(self):
        """Whether the towers' outputs are there already."""
        return not any(isinstance(m, dict) for m in self.media.values())


def positions_after(position_ids, count):
    """(3, count) of text that follows (3, P): from the largest position on, equal on all axes."""
    return (position_ids.max() + 1 + torch.arange(count)).expand(3, -1)


def shared_clip_groups(prompts):
    """
    Indices of prompts that hold the very same media object, in the order of the first of each group

    returns  list of lists of int; a prompt without media is a group of its own
    """
    groups = {}
    for b, prompt in enumerate(prompts):
        key = id(prompt.media) if prompt.media else f"prompt {b}"
        groups.setdefault(key, []).append(b)
    return list(groups.values())


class InputBuilder:
    """
    Turns a row into a Prompt, by the backbone's processor. Safe to call from several threads.

    raises  BadRow    the row's media cannot be used, or the prompt is too long
    """

    def __init__(self, folder, media_config, root, audio_captions):
        self.config = config_of(folder)
        self.backbone = BACKBONES[self.config.model_type]
        self.processor = from_pretrained(self.backbone.Processor, folder)
        self.backbone.check(self.config, self.processor, folder)
        self.per_thread = threading.local()
        if media_config is not None:
            media_config = media_config._replace(side=self.backbone.SIDE)
        self.media_config = media_config
        self.root = Path(root)
        self.audio_captions = audio_captions
        self.tokenizer = self.processor.tokenizer
        ends = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.eos_ids = sorted({self.tokenizer.eos_token_id, *ends} - {None})
        self.media_ends = self.backbone.media_ends(self.tokenizer, self.config)
        self.opened_tag = self.tag_opened_by_template()
        # Dummy input for ranks that run out of work. All ranks must make the same number of forward
        # passes, or FSDP would wait for ever.
        self.filler = Prompt(torch.tensor(self.eos_ids[:1] * 2), torch.arange(2).expand(3, -1), {})

    def __call__(self, row, hint=None):
        return self.from_clip(row, decode_clip(row, self.root, self.media_config), hint)

    def texts(self, completions):
        """What completions say, without special tokens and with the <think> that the prompt opened."""
        texts = [self.tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]
        return [self.opened_tag + text for text in texts]

    def tag_opened_by_template(self):
        """ "<think>" if the chat template writes it into every prompt, as Thinking models' do, else ""."""
        user = dict(role="user", content=[dict(type="text", text="?")])
        text = self.processor.apply_chat_template(
            [user], tokenize=False, add_generation_prompt=True
        )
        return "<think>" if text.rstrip().endswith("<think>") else ""

    def at(self, root):
        """The same builder for rows whose media lie under another folder."""
        other = copy.copy(self)
        other.root = Path(root)
        return other

    def chat(self, processor, kinds, row, hint, turns):
        """
        The prompt as text, with one placeholder for each medium.

        kinds   list of str   of the media: "image", "video", "audio"
        turns   None, or (system prompt, the user's turn) in the place of ours: text, or a list of
                pieces {"type": "text", "text"} and {"type", "index"} with the media among them
        """
        question = question_text(row, self.audio_captions)
        if hint:
            question = place_hint(question, hint)  # [HINT]
        system, text = turns or (SYSTEM_PROMPT, question)
        if isinstance(text, list):
            pieces = text
        else:
            pieces = [dict(type=kind) for kind in kinds]
            pieces.append(dict(type="text", text=text))
        messages = []
        if system:  # "": the template's own default, if it has one
            messages.append(dict(role="system", content=[dict(type="text", text=system)]))
        messages.append(dict(role="user", content=pieces))
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def own_processor(self):
        """This thread's processor: two threads must not call one fast tokenizer at once."""
        if not hasattr(self.per_thread, "processor"):
            self.per_thread.processor = copy.deepcopy(self.processor)
        return self.per_thread.processor

    def from_clip(self, row, clip, hint=None, turns=None):
        processor = self.own_processor()
        if turns and isinstance(turns[1], list):
            clip = clip.in_order(turns[1])
        kinds = ["image"] * len(clip.images)  # media before text: it moves scores by points
        if clip.frames is not None:
            kinds.append("video")
        if not clip.use_audio:  # else the sound belongs to the video
            kinds += ["audio"] * len(clip.sounds)
        text = self.chat(processor, kinds, row, hint, turns)
        name = f"row {row['prompt_id']}"
        input_ids, position_ids, media = self.backbone.inputs(
            processor, self.config, text, clip, name
        )
        return self.checked(Prompt(input_ids, position_ids, media), row)

    def checked(self, prompt, row):
        """The prompt itself; raises BadRow if it is too long."""
        num_tokens = len(prompt.input_ids)
        if num_tokens > self.media_config.max_prompt_tokens:
            raise BadRow(
                f"row {row['prompt_id']}: {num_tokens} prompt tokens, over --max-prompt-tokens "
                f"{self.media_config.max_prompt_tokens}: lower --max-frames or --max-pixels, or raise it"
            )
        return prompt

    def media_length(self, prompt):
        """How many tokens of a prompt come before the end of its last medium, the end included."""
        ends = torch.tensor(self.tokenizer.convert_tokens_to_ids(self.media_ends))
        return int(torch.isin(prompt.input_ids, ends).nonzero().max()) + 1

    def with_text(self, prompt, row, hint=None, turns=None):
        """The prompt of another question, or with a hint, about the same clip: it shares the media."""
        num_shared = self.media_length(prompt)  # up to there the two prompts are the same
        shared_ids = prompt.input_ids[:num_shared]
        shared_positions = prompt.position_ids[:, :num_shared]

        processor = self.own_processor()
        chat = self.chat(processor, ["audio"], row, hint, turns)  # any one medium, to cut it off
        text = chat.split(self.media_ends[-1])[1]
        ids = torch.tensor(processor.tokenizer(text).input_ids)
        positions = positions_after(shared_positions, len(ids))
        new = Prompt(
            torch.cat([shared_ids, ids]),
            torch.cat([shared_positions, positions], dim=1),
            prompt.media,
        )
        return self.checked(new, row)
