"""
Qwen3-Omni: its rows as prompts, its features, positions and logits against transformers' own forward,
whole runs with a tiny one, the published configuration, bad input.

    python -m pytest tests/test_qwen3.py
"""

import math
import re

import numpy as np
import published_configs
import pytest
import torch
from conftest import RECIPE, assert_same_values
from media_files import make_row
from transformers.core_model_loading import revert_weight_conversion

import toy
from data.clips import Clip
from models import qwen, qwen3
from models.inputs import InputBuilder
from models.loading import load_policy, wrap_policy


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A folder with a tiny Qwen3-Omni, weights random."""
    folder = tmp_path_factory.mktemp("qwen3") / "random"
    toy.make_model(folder, toy.WEIGHTS, "qwen3")
    return folder


# ---- against transformers' own forward ---------------------------------------------------------


def picture(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def sound(seed, num_samples):
    wave = np.random.default_rng(seed).normal(scale=0.1, size=num_samples)
    return wave.astype(np.float32)


FRAMES, FPS = picture(1, 6, 3, 64, 96), 1.7  # 2 / 1.7 * 13: positions between whole numbers
IMAGES = [picture(2, 3, 64, 64), picture(3, 3, 32, 96)]
SOUND = sound(4, 16000 * 9 + 700)  # more than one window of attention (8 s), no whole second
CASES = {
    "text": Clip(None, None, None, [], False),
    "image": Clip(None, None, None, IMAGES[:1], False),
    "several images": Clip(None, None, None, IMAGES, False),
    "video": Clip(FRAMES, FPS, None, [], False),
    "video with its sound": Clip(FRAMES, FPS, sound(5, 16000 * 3), [], True),
    "video, its sound goes on": Clip(FRAMES[:2], FPS, SOUND, [], True),
    "sound": Clip(None, None, SOUND, [], False),
    "several sounds": Clip(None, None, [SOUND, sound(6, 8000)], [], False),
    "video and sound beside it": Clip(FRAMES, FPS, SOUND, [], False),
    "images, video and its sound": Clip(FRAMES, FPS, SOUND, IMAGES, True),
}


def whole_forward(folder, thinker, clip, text, fps):
    """transformers' own: the processor's batch through the thinker -> batch, what the text model took, logits."""
    processor = InputBuilder(folder, RECIPE, ".", False).processor
    batch = processor(
        text=[text],
        images=clip.images or None,
        videos=None if clip.frames is None else [clip.frames],
        audio=clip.sounds or None,
        return_tensors="pt",
        load_audio_from_video=clip.use_audio,
        audio_from_video_indices=[0] if clip.use_audio else [],
        images_kwargs=dict(do_resize=False),
        videos_kwargs=dict(do_resize=False, do_sample_frames=False, fps=fps),
    )
    took = {}

    def remember(module, args, kwargs):
        took.update(kwargs)

    hook = thinker.model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        logits = thinker(**batch, use_audio_in_video=clip.use_audio).logits[0]
    hook.remove()
    return batch, took, logits


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_is_transformers_own_whole_forward(random_model, case):
    """Tokens, positions, embeddings, the middle layers' features and their places, logits."""
    clip = CASES[case]
    build = InputBuilder(random_model, RECIPE, ".", False)
    row = make_row(question="What is where, and when?")
    prompt = build.from_clip(row, clip)
    policy = load_policy(random_model, 0, True).eval()
    kinds = ["image"] * len(clip.images) + ["video"] * (clip.frames is not None)
    kinds += [] if clip.use_audio else ["audio"] * len(clip.sounds)
    text = build.chat(build.processor, kinds, row, None, None)
    plain = type(policy.thinker).from_pretrained(random_model, dtype=torch.float32).eval()
    batch, took, logits = whole_forward(random_model, plain, clip, text, clip.fps)

    assert torch.equal(prompt.input_ids, batch["input_ids"][0])
    assert torch.equal(prompt.position_ids, took["position_ids"][:, 0])
    with torch.no_grad():
        (head,) = policy.embed([prompt])
        assert_same_values(head.embeds, took["inputs_embeds"][0])
        if clip.images or clip.frames is not None:
            assert torch.equal(head.visual, took["visual_pos_masks"][0])
            theirs = torch.cat(list(took["deepstack_visual_embeds"]), dim=1)
            assert_same_values(head.deepstack, theirs)
        else:
            assert not head.visual.any() and head.deepstack.shape == (0, 0)
        tail = prompt.input_ids[-4:], prompt.position_ids[:, -4:]
        hidden, _ = policy.packed_forward([head.first(-4)], [[tail]])
        assert_same_values(policy.thinker.lm_head(hidden), logits[-5:])


# ---- published configurations ------------------------------------------------------------------


def test_names_of_the_published_weights():
    """
    The true 30B-A3B configuration, on the meta device: as transformers saves it, every name and shape is
    a published one, and none is left over.
    """
    with torch.device("meta"):
        thinker = qwen3.Thinker(qwen3.Thinker.config_class(**published_configs.QWEN3_30B_A3B))
    saved = revert_weight_conversion(thinker, thinker.state_dict())
    saved = {f"thinker.{name}": tuple(value.shape) for name, value in saved.items()}
    published = published_configs.qwen3_weights()
    assert saved == published
    audio = [shape for name, shape in published.items() if "audio_tower" in name]
    assert (len(published), len(audio)) == (18867 + 525 + 351, 525)
    assert 2 * sum(map(math.prod, audio)) == 1_295_854_336  # bytes in bfloat16, as audited
    # as printed by a project that built it from the hub's config.json
    assert sum(p.numel() for p in thinker.parameters()) == 31_719_205_488
    rotary = thinker.model.language_model.rotary_emb
    assert rotary.mrope_section == [24, 20, 20] and len(rotary.inv_freq) == 64


def test_lora_of_the_published_configuration_is_on_attention_alone():
    with torch.device("meta"):
        thinker = qwen3.Thinker(qwen3.Thinker.config_class(**published_configs.QWEN3_30B_A3B))
        policy = wrap_policy(thinker, lora_rank=16, train_towers=False)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    layers = {re.sub(r".*layers\.\d+\.|\.lora_.*", "", name) for name in trained}
    assert layers == {f"self_attn.{x}_proj" for x in "qkvo"} and len(trained) == 48 * 4 * 2


def test_the_3b_configuration_builds():
    with torch.device("meta"):
        thinker = qwen.Thinker(qwen.Thinker.config_class(**published_configs.QWEN25_3B))
        policy = wrap_policy(thinker, lora_rank=16, train_towers=True)
    text = thinker.model.language_model
    assert sum(p.numel() for n, p in text.named_parameters() if "lora" not in n) == 3_085_938_688
    assert policy.backbone is qwen
