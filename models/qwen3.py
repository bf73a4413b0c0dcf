"""
Qwen3-Omni: a row as what its thinker takes, what its towers make of a clip, and which of its layers
train and are sharded. Only this file knows the backbone by name; the network is transformers' own.

What differs from Qwen2.5-Omni (docs/qwen3.md): a mixture of experts behind every attention, frames and
sound interleaved token by token in time, and features of three middle layers of the vision tower
(deepstack), which the text model adds after its first three layers.

P prompt tokens, D width of the text model, K middle layers of the vision tower.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import Qwen3OmniMoeProcessor as Processor  # noqa: F401
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Thinker
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen3_omni

from data.clips import BadRow
from models import qwen
from run.errors import UserError

MODEL_TYPES = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
# linear layers that get a LoRA adapter: of the text model, of the towers. The router never does.
TEXT_LAYERS = r"q_proj|k_proj|v_proj|o_proj"
TOWER_LAYERS = (
    r"visual\.(.*\.)?(qkv|proj|linear_fc[12]|mlp\.[02])"
    r"|audio_tower\.(.*\.)?([qkv]_proj|out_proj|fc[12]|conv_out|proj[12])"
)
# parameters of three dimensions, one matrix an expert: they get one with --lora-experts
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
TEXT_UNITS = (qwen3_omni.Qwen3OmniMoeThinkerTextDecoderLayer,)  # what FSDP gathers at one time
TOWER_UNITS = (qwen3_omni.Qwen3OmniMoeVisionBlock, qwen3_omni.Qwen3OmniMoeAudioEncoderLayer)
FROZEN = ()  # parts of the towers that never train
SIDE = 32  # pixels; of a frame both sides are multiples: patches of 16, merged 2 x 2


# ---- a row as a prompt -------------------------------------------------------------------------


def check(config, processor, folder):
    """
    Stops where configuration and processor would place the same tokens at different times.

    The processor decides which frame a sound token stands behind, the configuration which position both
    get. The published files have 13 position ids a second; the configuration class falls back to 25.
    """
    if "captioner" in Path(folder).name.lower():
        raise UserError(f"{folder}: a Captioner takes no question: give Instruct or Thinking")
    video_processor = processor.video_processor
    compare(
        folder,
        "position_id_per_seconds",
        config.position_id_per_seconds,
        processor.position_id_per_seconds,
    )
    compare(folder, "n_window", config.audio_config.n_window, processor.n_window)
    compare(folder, "patch_size", config.vision_config.patch_size, video_processor.patch_size)
    compare(
        folder, "merge_size", config.vision_config.spatial_merge_size, video_processor.merge_size
    )
    compare(folder, "a token's side", video_processor.patch_size * video_processor.merge_size, SIDE)


def compare(folder, name, of_config, of_processor):
    if of_config != of_processor:
        raise UserError(
            f"{folder}: {name} is {of_config} in config.json, where the processor has "
            f"{of_processor}: take both files as Qwen3-Omni was published with them"
        )


def media_ends(tokenizer, config):
    """The tokens that media end with in a prompt, a sound's last."""
    return [tokenizer.vision_eos_token, tokenizer.audio_eos_token]


def inputs(processor, config, text, clip, name):
    """
    A prompt's text, a placeholder for each medium -> input_ids (P,), position_ids (3, P) float32, media.

    Positions are fractions where a pair of frames does not begin at a whole one.
    """
    for pixels in [*clip.images, *([] if clip.frames is None else [clip.frames])]:
        height, width = pixels.shape[-2:]
        if height % SIDE or width % SIDE:
            size = f"{width} x {height} pixels"
            raise BadRow(f"{name}: a frame of {size}: Qwen3-Omni takes multiples of {SIDE}")
    batch = qwen.process(processor, text, clip)  # without fps it would take one frame a second
    if "pixel_values_videos" in batch:
        seconds = torch.as_tensor(batch["video_second_per_grid"])
        pair = processor.video_processor.temporal_patch_size / clip.fps
        assert torch.equal(seconds, torch.tensor([pair])), f"{name}: {seconds} s a pair, not {pair}"
    return qwen.from_batch(Thinker, config, batch, use_audio=clip.use_audio)


# ---- experts -----------------------------------------------------------------------------------


def routers(thinker):
    """The modules that choose experts, in the order of the layers."""
    layers = thinker.model.language_model.layers
    return [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]


def route(router, hidden, choose):
    """A router's forward, transformers' own, with choose(indices) in the place of the likeliest experts."""
    hidden = hidden.reshape(-1, router.hidden_dim)
    logits = F.linear(hidden, router.weight)  # (tokens, experts)
    probs = logits.softmax(-1, dtype=torch.float)
    indices = choose(probs.topk(router.top_k, dim=-1).indices)
    weights = probs.gather(-1, indices)
    if router.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(logits.dtype), indices


# ---- towers ------------------------------------------------------------------------------------


def encode(core, prompts, device, train_towers):
    """
    The towers' outputs; each tower is run once for all prompts.

    returns  list, a prompt each, of modality -> (n, D), of pictures and frames (n, (1 + K) D): the
             tower's last layer and the middle ones side by side. What was encoded before passes through
    """
    if device.type == "cuda" and core.dtype != torch.float32:  # else a call for every window
        for tower in (core.visual, core.audio_tower):
            tower.config._attn_implementation_internal = "flash_windows"
    outputs = [dict(prompt.media) for prompt in prompts]
    if train_towers and dist.is_initialized():
        # sharded towers: a rank that skips one leaves the others waiting in its collectives
        outputs.append(smallest_media(core.config))
    visual = [(o, m) for o in outputs for m in ("image", "video") if isinstance(o.get(m), dict)]
    if visual:
        pixels = torch.cat([o[m]["pixels"].to(device) for o, m in visual])
        grid = torch.cat([o[m]["grid"].to(device) for o, m in visual])
        output = core.get_video_features(pixels, grid, return_dict=True)
        layers = zip(output.pooler_output, *output.deepstack_features)
        pieces = [torch.cat(layers_of_one, dim=1) for layers_of_one in layers]
        for o, m in visual:
            o[m] = torch.cat([pieces.pop(0) for _ in o[m]["grid"]])
    audible = [o for o in outputs if isinstance(o.get("audio"), dict)]
    if audible:
        lengths = torch.cat([o["audio"]["lengths"] for o in audible])
        mels = torch.cat([o["audio"]["mel"] for o in audible], dim=1).to(device)
        features = core.audio_tower(mels, feature_lens=lengths.to(device)).last_hidden_state
        window = core.audio_tower.n_window
        sizes = qwen3_omni._get_feat_extract_output_lengths(lengths, window).tolist()
        pieces = list(features.split(sizes))
        for o in audible:
            o["audio"] = torch.cat([pieces.pop(0) for _ in o["audio"]["lengths"]])
    return outputs


def smallest_media(config):
    """A pair of frames and some sound, for towers that every rank has to run."""
    vision = config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    size = vision.spatial_merge_size
    frames = dict(pixels=torch.zeros(size**2, patch), grid=torch.tensor([[1, size, size]]))
    mel = torch.zeros(config.audio_config.num_mel_bins, 200)
    return dict(video=frames, audio=dict(mel=mel, lengths=torch.tensor([200])))
