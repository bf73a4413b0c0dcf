"""
Qwen2.5-Omni: a row as what its thinker takes, what its towers make of a clip, and which of its layers
train and are sharded. Only this file knows the backbone by name.

P prompt tokens, D width.
"""

import copy
import threading
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig
from transformers import Qwen2_5OmniProcessor as Processor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker  # noqa: F401
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

from hints import place_hint
from rows import data
from run.folders import from_pretrained

# linear layers that get a LoRA adapter: of the text model, of the towers
TEXT_LAYERS = r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TOWER_LAYERS = r"q|k|v|[qkv]_proj|out_proj|proj|fc1|fc2|gate_proj|up_proj|down_proj|mlp\.0|mlp\.2"
TEXT_UNITS = (omni.Qwen2_5OmniDecoderLayer,)  # what FSDP gathers at one time
TOWER_UNITS = (omni.Qwen2_5OmniVisionBlock, omni.Qwen2_5OmniAudioEncoderLayer)


# ---- a row as a prompt -------------------------------------------------------------------------


class Prompt(NamedTuple):
    """One prompt as the model takes it. Media are tensors for the towers, or their outputs."""

    input_ids: torch.Tensor  # (P,) int64, media placeholders filled in
    position_ids: torch.Tensor  # (3, P) int64: TMRoPE time, height, width
    media: dict  # modality -> what its tower takes (dict), or (n, D) what it gave

    @property
    def encoded(self):
        return not any(isinstance(m, dict) for m in self.media.values())


class PositionIndex(omni.Qwen2_5OmniPreTrainedModelForConditionalGeneration):
    """The model's own `get_rope_index` without the model, so that decode threads can call it."""

    def __init__(self, config):
        super().__init__(config)
        self.spatial_merge_size = config.vision_config.spatial_merge_size


class InputBuilder:
    """
    A row -> Prompt, by the backbone's processor; calling it is safe from several threads.

    raises  data.BadRow     the row's media cannot be used, or the prompt is too long
    """

    def __init__(self, folder, recipe, root, audio_captions):
        self.processor = from_pretrained(Processor, folder)
        # a fast tokenizer must not be called by two threads at once: a processor a thread
        self.in_thread = threading.local()
        config = from_pretrained(AutoConfig, folder)
        self.config = getattr(config, "thinker_config", config)
        self.position_index = PositionIndex(self.config)
        self.recipe, self.root, self.audio_captions = recipe, Path(root), audio_captions
        self.tokenizer = self.processor.tokenizer
        ends = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.eos_ids = sorted({self.tokenizer.eos_token_id, *ends} - {None})
        media_ends = [self.tokenizer.vision_eos_token, self.tokenizer.audio_eos_token]
        self.media_end_ids = self.tokenizer.convert_tokens_to_ids(media_ends)
        # what a rank reads that has less to do than others: FSDP would wait for ever
        ids = torch.tensor(self.eos_ids[:1] * 2)
        self.filler = Prompt(ids, torch.arange(2).expand(3, -1), {})

    def __call__(self, row, hint=None):
        return self.from_clip(row, data.decode_clip(row, self.root, self.recipe), hint)

    def texts(self, completions):
        """What a group of completions says, without special tokens."""
        return [self.tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]

    def at(self, root):
        """The same builder for rows whose media lie under another folder."""
        other = copy.copy(self)
        other.root = Path(root)
        return other

    def chat(self, processor, media, row, hint, words):
        """
        The prompt as text, with one placeholder for each of `media`.

        words   None, or (system prompt, the user's turn) in the place of ours: text, or a list of
                pieces {"type": "text", "text"} and {"type", "index"} with the media among them
        """
        question = data.question_text(row, self.audio_captions)
        question = place_hint(question, hint) if hint else question  # [HINT]
        system, text = words or (data.SYSTEM_PROMPT, question)
        pieces = [*({"type": kind} for kind in media), {"type": "text", "text": text}]
        content = text if isinstance(text, list) else pieces
        messages = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": content},
        ]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def own_processor(self):
        if not hasattr(self.in_thread, "processor"):
            self.in_thread.processor = copy.deepcopy(self.processor)
        return self.in_thread.processor

    def from_clip(self, row, clip, hint=None, words=None):
        processor = self.own_processor()
        media = ["image"] * len(clip.images)  # media first: it moves scores by points
        media += ["video"] * (clip.frames is not None)
        media += ["audio"] * (0 if clip.use_audio else len(clip.sounds))
        text = self.chat(processor, media, row, hint, words)
        kwargs = dict(text=text, return_tensors="pt", images_kwargs=dict(do_resize=False))
        kwargs["videos_kwargs"] = dict(kwargs["images_kwargs"], do_sample_frames=False)
        kwargs["videos_kwargs"]["cap_pixels_per_frame"] = False
        if clip.images:
            kwargs["images"] = in_order(clip.images, "image", words)
        if clip.frames is not None:
            kwargs["videos"] = [clip.frames]
            # of the frames really taken: the positions tell their time
            kwargs["videos_kwargs"]["fps"] = clip.fps
        if sounds := clip.sounds:
            # without max_length the extractor pads every clip to 300 s
            kwargs["audio"] = sounds if clip.use_audio else in_order(sounds, "audio", words)
            length = -(-max(map(len, sounds)) // 160) * 160
            kwargs["audio_kwargs"] = dict(max_length=length, truncation=False)
            if clip.use_audio:
                kwargs.update(load_audio_from_video=True, audio_from_video_indices=[0])
        batch = processor(**kwargs)
        return self.checked(self.to_prompt(batch, clip.use_audio), row)

    def checked(self, prompt, row):
        if (num_tokens := len(prompt.input_ids)) > self.recipe.max_prompt_tokens:
            raise data.BadRow(
                f"row {row['prompt_id']}: {num_tokens} prompt tokens, over --max-prompt-tokens "
                f"{self.recipe.max_prompt_tokens}: lower --max-frames or --max-pixels, or raise it"
            )
        return prompt

    def with_text(self, prompt, row, hint=None, words=None):
        """The prompt of another question, or of a hint, about the same clip: the same media."""
        is_end = torch.isin(prompt.input_ids, torch.tensor(self.media_end_ids))
        media = int(is_end.nonzero().max()) + 1  # tokens up to the end of the last medium
        processor = self.own_processor()
        text = self.chat(processor, ["audio"], row, hint, words)
        text = text.split(self.tokenizer.audio_eos_token)[1]
        tail = torch.tensor(processor.tokenizer(text).input_ids)
        positions = prompt.position_ids[:, :media]
        after = int(positions.max()) + 1 + torch.arange(len(tail))  # text: all three the same
        positions = torch.cat([positions, after.expand(3, -1)], dim=1)
        ids = torch.cat([prompt.input_ids[:media], tail])
        return self.checked(Prompt(ids, positions, prompt.media), row)

    def key(self, row):
        """What tells one clip from another: rows with the same key differ only in their texts."""
        return (str(self.root.resolve()), *data.clip_of(row))

    def to_prompt(self, batch, use_audio):
        input_ids, media, mel_lengths = batch["input_ids"], {}, None
        if "pixel_values" in batch:
            media["image"] = dict(pixels=batch["pixel_values"], grid=batch["image_grid_thw"])
        if "pixel_values_videos" in batch:
            media["video"] = dict(pixels=batch["pixel_values_videos"], grid=batch["video_grid_thw"])
        if "input_features" in batch:
            mel_lengths = batch["feature_attention_mask"].sum(1)
            mels = [x[:, :n] for x, n in zip(batch["input_features"], mel_lengths)]  # no padding
            media["audio"] = dict(mel=torch.cat(mels, dim=1), lengths=mel_lengths)
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


def in_order(media, kind, words):
    """Media in the order in which words name them, if they name any."""
    if words and isinstance(words[1], list):
        return [media[piece["index"]] for piece in words[1] if piece["type"] == kind]
    return media


# ---- towers ------------------------------------------------------------------------------------


def encode(core, prompts, device, train_towers):
    """
    The towers' outputs; each tower is run once for all prompts if it trains, else a prompt at
    a time: the clips of a batch at once can be 100 GB.

    returns  list, a prompt each, of modality -> (n, D); what was encoded before passes through
    """
    if not train_towers and len(prompts) > 1:
        return [encode(core, [prompt], device, False)[0] for prompt in prompts]
    out = [dict(p.media) for p in prompts]
    if train_towers and dist.is_initialized():
        # sharded towers: a rank that skips one leaves the others waiting in its collectives
        video = dict(pixels=torch.zeros(4, 1176), grid=torch.tensor([[1, 2, 2]]))
        sound = dict(mel=torch.zeros(128, 200), lengths=torch.tensor([200]))
        out.append(dict(video=video, audio=sound))
    seen = [(o, m) for o in out for m in ("image", "video") if isinstance(o.get(m), dict)]
    heard = [o for o in out if isinstance(o.get("audio"), dict)]
    if seen:
        pixels = torch.cat([o[m]["pixels"].to(device) for o, m in seen])
        grid = torch.cat([o[m]["grid"].to(device) for o, m in seen])
        pieces = list(core.get_video_features(pixels, grid, return_dict=True).pooler_output)
        for o, m in seen:
            o[m] = torch.cat([pieces.pop(0) for _ in o[m]["grid"]])
    if heard:
        lengths = torch.cat([o["audio"]["lengths"] for o in heard])
        mels = torch.cat([o["audio"]["mel"].T.to(device) for o in heard])
        mels = pad_sequence(mels.split(lengths.tolist()), batch_first=True)
        mask = (torch.arange(mels.shape[1]) < lengths[:, None]).long().to(device)
        sound = core.get_audio_features(mels.transpose(1, 2), mask, return_dict=True)
        sizes = (((lengths - 1) // 2 + 1 - 2) // 2 + 1).tolist()
        pieces = list(sound.last_hidden_state.split(sizes))
        for o in heard:
            o["audio"] = torch.cat([pieces.pop(0) for _ in o["audio"]["lengths"]])
    return out
