"""
The toy's model: a tiny Qwen2.5-Omni, Qwen3-Omni or Ola with the architecture, the tokenizer class, the chat
format and the processors of the 7B one, written as a standard Hugging Face folder.
"""

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeThinkerConfig,
    WhisperFeatureExtractor,
)
from transformers.utils.logging import disable_progress_bar

from data.rows import SYSTEM_PROMPT, completion_text, question_text
from data.toy_clips import SIZE
from data.toy_rows import make_row
from hints import place_hint
from models import ola, qwen, qwen3
from run.io import temp_dir

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif c['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
# the names that Qwen3-Omni has for the same tokens
QWEN3_TOKENS = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def with_qwen3_tokens(text):
    for name, token in SPECIAL_TOKENS.items():
        text = text.replace(token, QWEN3_TOKENS[name])
    return text


def make_tokenizer_json(corpus, vocab_size):
    """A byte-level BPE like Qwen's, learned from `corpus` (an iterable of str) -> its JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def toy_corpus(seed):
    """Texts that hold every word the toy uses."""
    rng = np.random.default_rng(seed)
    for i in range(3000):
        row, _ = make_row(rng, 0, str(i), "text")
        question = question_text(row, False)
        question = place_hint(question, row["hint"]) if row.get("hint") else question
        yield f"system\n{SYSTEM_PROMPT}user\n{question}assistant\n{completion_text(row)}"


def build_processor(tokenizer):
    pixels = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    return qwen.Processor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        video_processor=Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=False),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer):
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2_5OmniThinkerConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            initializer_range=0.08,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            # time gets half of the rotary pairs: a clip spans 150 positions of it
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 4, 4]),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=128,
            intermediate_size=256,
            num_heads=4,
            out_hidden_size=128,
            fullatt_block_indexes=[1],
            initializer_range=0.08,
        ),
        audio_config=dict(
            d_model=128,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=256,
            output_dim=128,
            initializer_range=0.08,
        ),
        audio_token_index=token_id("<|AUDIO|>"),
        image_token_index=token_id("<|IMAGE|>"),
        video_token_index=token_id("<|VIDEO|>"),
        audio_start_token_id=token_id("<|audio_bos|>"),
        audio_end_token_id=token_id("<|audio_eos|>"),
        tie_word_embeddings=False,
        vision_start_token_id=token_id("<|vision_bos|>"),
        vision_end_token_id=token_id("<|vision_eos|>"),
        initializer_range=0.08,
        avatar_toy=True,
    )


def build_ola(tokenizer):
    """-> processor and configuration of a tiny Ola; it hears windows of 10 s."""
    tokens = {kind: SPECIAL_TOKENS[f"{kind}_token"] for kind in ("image", "video", "audio")}
    ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(t) for k, t in tokens.items()}
    config = ola.OlaConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=10000.0,
            initializer_range=0.08,
        ),
        vision_config=dict(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=256,
            patch_size=16,
            hidden_act="gelu",
        ),
        speech_config=dict(
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            max_source_positions=500,
            num_mel_bins=128,
        ),
        music_config=dict(
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=128,
            embed_size=64,
            conv_pos=16,
            conv_pos_groups=4,
            num_buckets=32,
            max_distance=80,
        ),
        **ids,
        projector_size=128,
        min_frame_pixels=0,
        low_view_pixels=64 * 64,
        initializer_range=0.08,
        avatar_toy=True,
    )
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=10)
    return ola.OlaProcessor(extractor, tokenizer, chat_template=ola.chat_template(tokens)), config


def build_qwen3(tokenizer):
    """
    -> processor and configuration of a tiny Qwen3-Omni: 8 experts of which 2 are taken, heads wider
    than the model divided by their number, and two middle layers of the vision tower.
    """
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen3OmniMoeThinkerConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            max_position_embeddings=32768,
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10000.0,
                mrope_section=[12, 10, 10],
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            depth=3,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=128,
            num_position_embeddings=16,  # 4 x 4 patches: a frame of 64 pixels
            deepstack_visual_indexes=[0, 1],
            initializer_range=0.08,
        ),
        audio_config=dict(
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            output_dim=128,
            downsample_hidden_size=16,
            initializer_range=0.08,
        ),
        position_id_per_seconds=13,  # as published; the class falls back to 25
        audio_token_id=token_id(QWEN3_TOKENS["audio_token"]),
        image_token_id=token_id(QWEN3_TOKENS["image_token"]),
        video_token_id=token_id(QWEN3_TOKENS["video_token"]),
        audio_start_token_id=token_id(QWEN3_TOKENS["audio_bos_token"]),
        audio_end_token_id=token_id(QWEN3_TOKENS["audio_eos_token"]),
        vision_start_token_id=token_id(QWEN3_TOKENS["vision_bos_token"]),
        vision_end_token_id=token_id(QWEN3_TOKENS["vision_eos_token"]),
        initializer_range=0.08,
        avatar_toy=True,
    )
    sizes = dict(
        size={"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = qwen3.Processor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=with_qwen3_tokens(CHAT_TEMPLATE),
    )
    return processor, config


def write_model(folder, weights, backbone="qwen"):
    """
    Writes a standard Hugging Face folder.

    weights   a safetensors file of a Qwen2.5-Omni: its weights for that backbone, its tokenizer for
              all; None for random weights and a tokenizer made anew
    backbone  "qwen", "qwen3" or "ola"
    """
    disable_progress_bar()
    if weights:
        with safe_open(weights, "pt") as file:
            tokenizer_json = file.metadata()["tokenizer"]
    else:
        tokenizer_json = make_tokenizer_json(toy_corpus(seed=0), vocab_size=640)
    special_tokens = SPECIAL_TOKENS
    if backbone == "qwen3":
        tokenizer_json, special_tokens = with_qwen3_tokens(tokenizer_json), QWEN3_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special_tokens,
    )
    torch.manual_seed(0)
    if backbone == "qwen3":
        processor, config = build_qwen3(tokenizer)
        thinker = qwen3.Thinker(config)
    elif backbone == "ola":
        processor, config = build_ola(tokenizer)
        thinker = ola.Thinker(config)
    else:
        processor, thinker = build_processor(tokenizer), qwen.Thinker(build_config(tokenizer))
        if weights:
            thinker.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    part = temp_dir(folder)
    thinker.save_pretrained(part)
    processor.save_pretrained(part)
    part.rename(folder)


def ship_weights(folder, path):
    """A trained model folder -> a file: bfloat16, with the tokenizer in its metadata."""
    state = qwen.Thinker.from_pretrained(folder).state_dict()
    tokenizer_json = AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    state = {k: v.bfloat16().contiguous() for k, v in state.items()}
    save_file(state, path, metadata={"tokenizer": tokenizer_json})
