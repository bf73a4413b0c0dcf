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
    r"visual\.(?!patch_embed\.)(.*\.)?(qkv|proj|linear_fc[12]|mlp\.[02])"
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
        if not torch.equal(seconds, torch.tensor([pair])):
            raise UserError(
                f"{name}: the processor counts {seconds.tolist()} s for a pair of frames, not {pair}: "
                "install the transformers of requirements.txt"
            )
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
    The towers' outputs; each tower runs once for all prompts.

    returns  list, one per prompt, of {modality: (n, D)}; of pictures and frames (n, (1 + K) D): the
             tower's last layer and the middle ones side by side. What is encoded already passes through
    """
    return qwen.encode_by(core, prompts, device, train_towers, run_visual, run_audio)


def run_visual(core, pixels, grid):
    """-> features of each image and video of a batch, those of the middle layers beside them"""
    output = core.get_video_features(pixels, grid, return_dict=True)
    layers = zip(output.pooler_output, *output.deepstack_features)
    return [torch.cat(layers_of_one, dim=1) for layers_of_one in layers]


def run_audio(core, mels, lengths):
    """mels (num_mels, sum of lengths) -> features of each sound of a batch"""
    features = core.audio_tower(mels, feature_lens=lengths.to(mels.device)).last_hidden_state
    window = core.audio_tower.n_window
    return features.split(qwen3_omni._get_feat_extract_output_lengths(lengths, window).tolist())
