"""
What test_ola.py compares with: outputs of the original Ola on tiny random weights, in float32, and the
names of its parameters. Made once, from checkouts of github.com/Ola-Omni/Ola (f681820) and
github.com/openai/whisper (c0d2f62):

    python tests/ola_fixtures.py OLA_CHECKOUT WHISPER_CHECKOUT     # writes tests/ola_fixtures.safetensors

Weights and inputs follow from their names (`noise`), so only outputs are stored. The original imports
packages that a CPU does not have or need: flash_attn is replaced by torch's attention, timm by the two
modules that are used of it, deepspeed by nothing; of Whisper its encoder is used as it is. The
original casts what its sound encoders give to bfloat16; here it stays float32.
"""

import json
import math
import os
import re
import sys
import types
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.models.clip import image_processing_clip, modeling_clip  # noqa: F401  before substitutes

HERE = Path(__file__).resolve().parent
FILE = HERE / "ola_fixtures.safetensors"
CONFIG = (
    dict(  # the published config.json, as far as it says how the model is built, but for the sizes
        model_type="ola_qwen",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=None,
        vocab_size=640,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        mm_hidden_size=64,
        mm_projector_type="ola_mlp",
        speech_encoder_ds_rate=10,
        speech_encoder_hidden_size=48,
        speech_encoder_type="dual",
        speech_projector_type="linear",
        speech_encoder="./pretrained/large-v3.pt",
        music_encoder="./pretrained/BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt",
    )
)
WHISPER = dict(
    n_mels=128,
    n_audio_ctx=100,
    n_audio_state=32,
    n_audio_head=4,
    n_audio_layer=2,
    n_vocab=8,
    n_text_ctx=8,
    n_text_state=8,
    n_text_head=2,
    n_text_layer=1,
)
BEATS = dict(  # what the published file says, but for the sizes
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=32,
    encoder_attention_heads=4,
    embed_dim=12,
    input_patch_size=16,
    conv_bias=False,
    conv_pos=16,
    conv_pos_groups=4,
    relative_position_embedding=True,
    num_buckets=32,
    max_distance=40,
    gru_rel_pos=True,
    deep_norm=True,
    layer_norm_first=False,
    activation_fn="gelu",
    finetuned_model=True,
    predictor_class=5,
)
TRUE = (  # sizes of the published weights
    dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        mm_hidden_size=1152,
        speech_encoder_hidden_size=2048,
    ),
    dict(
        n_audio_ctx=1500,
        n_audio_state=1280,
        n_audio_head=20,
        n_audio_layer=32,
        n_vocab=51866,
        n_text_ctx=448,
        n_text_state=1280,
        n_text_head=20,
        n_text_layer=32,
    ),
    dict(
        encoder_layers=12,
        encoder_embed_dim=768,
        encoder_ffn_embed_dim=3072,
        embed_dim=512,
        encoder_attention_heads=12,
        conv_pos=128,
        conv_pos_groups=16,
        num_buckets=320,
        max_distance=800,
        predictor_class=527,
    ),
)
DEPTH = 2, 27  # blocks of the vision tower: tiny, published
SECONDS = 2  # of a window: that the tiny Whisper takes
SIZES = [(32, 64), (96, 32), (64, 64)]  # height, width of pictures
QUESTION = "Which color?"


def noise(name, *shape):
    """Numbers that follow from a name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def weights(shapes):
    """{name: shape} -> {name: tensor}, small enough to go through many layers"""
    made = {}
    for name, shape in shapes.items():
        # one table of distances, which all layers of BEATs share
        x = noise(re.sub(r"layers.\d+(.*relative)", r"layers.0\1", name), *shape)
        is_norm = len(shape) == 1 and name.endswith("weight")
        wide = math.prod(shape[1:]) if len(shape) > 1 and "embed" not in name else 4
        made[name] = 1 + 0.1 * x if is_norm or name.endswith("weight_g") else x / wide**0.5
    return made


def picture(name, *size):
    """(..., 3, H, W) uint8"""
    return (noise(name, *size).clamp(-2, 2) * 63 + 127).byte()


def sound(name, num_windows):
    """(W, S): tones and noise, the last window half silent"""
    t = torch.arange(num_windows * SECONDS * 16000) / 16000
    x = 0.2 * torch.sin(2 * math.pi * 440 * t) + 0.05 * noise(name, len(t))
    x[-SECONDS * 8000 :] = 0
    return x.view(num_windows, -1)


# ---- the original ------------------------------------------------------------------------------


def substitutes(whisper_checkout):
    def module(name, **what):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(what)
        return sys.modules[name]

    def flash(q, k, v, softmax_scale):  # (B, N, H, E)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)

    def flash_by_length(q, k, v, cu_seqlens_q, softmax_scale, **_):  # (N, H, E)
        lengths = cu_seqlens_q.diff().tolist()
        pieces = zip(*(x[None].split(lengths, dim=1) for x in (q, k, v)))
        return torch.cat([flash(*piece, softmax_scale) for piece in pieces], dim=1)[0]

    class Mlp(nn.Module):
        def __init__(self, in_features, hidden_features, act_layer, drop):
            super().__init__()
            self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
            self.fc2 = nn.Linear(hidden_features, in_features)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    class PatchEmbed(nn.Module):
        def __init__(self, img_size, patch_size, in_chans, embed_dim, bias, **_):
            super().__init__()
            self.patch_size, self.num_patches = (patch_size,) * 2, (img_size // patch_size) ** 2
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    module("flash_attn", flash_attn_func=flash, flash_attn_varlen_func=flash_by_length)
    module("deepspeed")
    unused = "AttentionPoolLatent DropPath LayerType PatchDropout resample_abs_pos_embed".split()
    module("timm"), module("timm.models")
    module("timm.layers", Mlp=Mlp, PatchEmbed=PatchEmbed, **dict.fromkeys(unused))
    module("timm.models._manipulate", checkpoint_seq=None, named_apply=None)
    # of Whisper the model and the spectrogram, without what it imports to transcribe
    whisper = module("whisper")
    whisper.__path__ = [str(Path(whisper_checkout) / "whisper")]
    module("whisper.decoding", decode=None, detect_language=None)
    module("whisper.transcribe", transcribe=None)
    module("whisper.utils", exact_div=lambda x, y: x // y)
    for part in ("model", "audio"):
        setattr(whisper, part, __import__(f"whisper.{part}", fromlist=[part]))


def build(sizes, depth):
    """-> the original's parts: text model, vision tower, both projectors, both sound encoders."""
    from ola.model.multimodal_encoder.oryx_vit import VisionTransformer
    from ola.model.multimodal_projector.builder import build_vision_projector
    from ola.model.speech_encoder.beats.BEATs import BEATs, BEATsConfig
    from ola.model.speech_projector.builder import build_speech_projector
    from whisper.model import ModelDimensions, Whisper

    config, whisper, beats = sizes
    namespace = types.SimpleNamespace(**config)
    keys = [k for k in config if not re.match("mm_|speech|music|model_type|rope_scaling", k)]
    with torch.device("cpu"):  # on the meta device its weights could not be drawn
        beats = BEATs(BEATsConfig(beats))
    return {
        "text": transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**{k: config[k] for k in keys})
        ),
        "tower": VisionTransformer(
            img_size=2048,
            patch_size=16,
            embed_dim=config["mm_hidden_size"],
            depth=depth,
            num_heads=16,
            mlp_ratio=3.7362,
            class_token=False,
            global_pool="map",
            num_classes=0,
        ),
        "vision": build_vision_projector(namespace),
        "sound": build_speech_projector(namespace),
        "whisper": Whisper(ModelDimensions(**whisper)),
        "beats": beats,
    }


def published(parts):
    """-> {name: tensor} as in the safetensors, in Whisper's file and in BEATs' file"""
    prefixes = {
        "text": "",
        "tower": "model.vision_tower.vision_tower.",
        "vision": "model.mm_projector.",
        "sound": "model.speech_projector.",
    }
    whole = {}
    for name, prefix in prefixes.items():
        whole |= {prefix + key: value for key, value in parts[name].state_dict().items()}
    return whole, parts["whisper"].state_dict(), parts["beats"].state_dict()


def shapes_of(states):
    return [{name: list(value.shape) for name, value in state.items()} for state in states]


def folded(shapes):
    """{name: shape} -> {name with * for the number of a layer: [how many, shape]}"""
    found = {}
    for name, shape in shapes.items():
        found.setdefault(re.sub(r"(layers|blocks)\.\d+", r"\1.*", name), [0, shape])[0] += 1
    return found


def unfolded(found):
    return {
        name.replace("*", str(i)): shape for name, (n, shape) in found.items() for i in range(n)
    }


class Spliced:
    """The original's splice of features into a prompt, without its loader."""

    def __init__(self, parts):
        from ola.model.multimodal_encoder.oryx_vit import SigLIPViTAnysizeWrapper as Wrapper
        from ola.model.ola_arch import OlaMetaForCausalLM
        from ola.model.speech_encoder.speech_encoder import DualWrappedEncoder as Dual

        self.tower, self.dual = Wrapper.__new__(Wrapper), Dual.__new__(Dual)
        for x in (self.tower, self.dual):
            nn.Module.__init__(x)
        self.tower.vision_tower = parts["tower"]
        self.dual.whisper_model, self.dual.beats_model = parts["whisper"].encoder, parts["beats"]

        class Model:
            embed_tokens = parts["text"].model.embed_tokens
            mm_projector, speech_projector = parts["vision"], parts["sound"]
            get_vision_tower = lambda _: self.tower  # noqa: E731
            get_speech_encoder = lambda _: self.dual  # noqa: E731

        class Meta(OlaMetaForCausalLM):
            config, device = types.SimpleNamespace(**CONFIG), torch.device("cpu")
            get_model = lambda _: Model()  # noqa: E731

        self.meta = Meta()

    def __call__(self, ids, low, high, modality, mel, waves):
        lengths = torch.tensor([mel.shape[1]] * len(mel))
        num_chunks = torch.tensor([len(mel)])
        prepare = self.meta.prepare_inputs_labels_for_speech_vision_text
        return prepare(
            ids[None],
            *[None] * 4,
            [mel],
            [lengths],
            num_chunks,
            [waves],
            [low],
            [modality],
            None,
            [high],
        )[4][0]


def main():
    ola_checkout, whisper_checkout = sys.argv[1:]
    os.environ |= dict(
        FORCE_NO_DOWNSAMPLE="1",
        VIDEO_RESIZE="0x64",
        LOWRES_RESIZE="384x32",
        HIGHRES_BASE="0x32",
        VIDEO_MAXRES="480",
        VIDEO_MINRES="288",
    )
    sys.path.insert(0, ola_checkout)
    substitutes(whisper_checkout)
    import whisper
    from ola.conversation import conv_templates
    from ola.datasets import preprocess
    from tokenizers import Tokenizer

    parts = build((CONFIG, WHISPER, BEATS), DEPTH[0])
    states = published(parts)
    for state in states:
        for name, value in weights({n: v.shape for n, v in state.items()}).items():
            state[name].copy_(value)
    for part in parts.values():
        part.eval()
    linspace = torch.linspace  # the tower asks it for numbers
    torch.linspace = lambda *given: linspace(*given, device="cpu")
    torch.Tensor.to_sparse = lambda x: x
    with torch.device("meta"):
        sizes = [tiny | true for tiny, true in zip((CONFIG, WHISPER, BEATS), TRUE)]
        names = [folded(shapes) for shapes in shapes_of(published(build(sizes, DEPTH[1])))]

    out, torch.bfloat16 = {}, torch.float32  # see above
    normal = lambda x: (x.float() / 255 - 0.5) / 0.5  # noqa: E731
    for height, width in SIZES:
        x = picture(f"{height} {width}", 2, 3, height, width)
        features, size = parts["tower"](normal(x))[:2]
        out[f"tower {height} {width}"] = features
        out[f"video {height} {width}"] = parts["vision"](features, size, features, size, "video")[0]
    low, high = (picture(f"view {h}", 1, 3, h, w) for h, w in SIZES[:2])
    (a, b), (size_a, size_b), _ = parts["tower"]([normal(low), normal(high)])
    out["picture"] = parts["vision"](a, size_a, b, size_b, "image")[0]

    splice = Spliced(parts)
    waves = sound("sound", 2)
    mel = torch.stack([whisper.audio.log_mel_spectrogram(wave, n_mels=128) for wave in waves])
    out["mel"], out["fbank"] = mel[..., ::8], parts["beats"].preprocess(waves)[..., ::8]
    out["whisper"] = parts["whisper"].encoder(mel)
    out["beats"] = parts["beats"].extract_features(waves, feature_only=True)[0]
    out["fused"] = splice.dual(mel, raw_wav=waves)
    out["sound"] = parts["sound"](out["fused"])

    with safe_open(HERE.parent / "toy_stage0.safetensors", "pt") as file:
        tokenizer = Tokenizer.from_str(file.metadata()["tokenizer"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    frames = normal(picture("frames", 3, 3, 32, 64))
    nothing, silence = torch.zeros(1, 3, 32, 32), (mel[:1] * 0, waves[:1] * 0)
    heard = mel.transpose(1, 2), waves
    cases = {
        "video and sound": ("<speech><image>\n", "speech_image", (frames, frames, "video"), heard),
        "video": (
            "<image>\n",
            "image",
            (frames, frames, "video"),
            (silence[0].transpose(1, 2), silence[1]),
        ),
        "sound": ("<speech>\n", "speech", (nothing, nothing, "text"), heard),
        "image": (
            "<image>\n",
            "image",
            (normal(low), normal(high), "image"),
            (silence[0].transpose(1, 2), silence[1]),
        ),
    }
    for name, (marks, kind, seen, heard) in cases.items():
        conversation = conv_templates["qwen_1_5"].copy()
        conversation.append_message(conversation.roles[0], marks + QUESTION)
        conversation.append_message(conversation.roles[1], None)
        tokenize = getattr(preprocess, f"tokenizer_{kind}_token")
        ids = tokenize(
            conversation.get_prompt(),
            tokenizer,
            **(dict(image_token_index=-300) if "image" in kind else {}),
            return_tensors="pt",
        )
        embeds = splice(ids, *seen, *heard)
        out[f"embeds, {name}"] = embeds
        out[f"logits, {name}"] = parts["text"](inputs_embeds=embeds[None]).logits[0, -4:]
    out = {name: value.detach().contiguous().clone() for name, value in out.items()}
    metadata = dict(tiny=json.dumps(shapes_of(states)), published=json.dumps(names))
    save_file(out, FILE, metadata=metadata)
    print(f"{FILE}: {len(out)} tensors, {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    with torch.no_grad():
        main()
