"""
The embedded default: real mp4 clips with known answers, and a tiny Qwen2.5-Omni to train on them.

A clip lasts N seconds. In each second nothing, one or two coloured shapes are shown at the left,
center or right, while a high tone, a low tone or silence is heard. Every question has one answer
that follows from the clip; more seconds are harder. The model has the architecture, the tokenizer
class, the chat format and the processors of the 7B one, at 2.1 M parameters, and goes through the
same `from_pretrained`. Its weights (`toy_stage0.safetensors`) are the result of stage 0:

    python toy.py                  # write toy/model and the rows and clips of every stage
    python toy.py --out DIR --random-init --stages 0 --num-train 8000    # to rebuild stage 0 ...
    python train_sft.py --model DIR/model --data DIR/stage0/train.jsonl ...   # ... see docs/results.md
    python toy.py --backbone ola --out DIR         # a tiny Ola, with random weights: stage 0 first

The cold-start reasonings are imperfect on purpose, as scraped ones are: some look at every second,
some at one, and some jump to an answer. Reinforcement has to find out which kind pays.
"""

import run.before_torch  # noqa: F401  must come before torch

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.utils.logging import disable_progress_bar

from data.clips import BadRow
from data.rows import SYSTEM_PROMPT, completion_text, question_text
from data.toy_clips import COLORS, PLACES, SHAPES, SIZE, TONES, describe, random_seconds, write_clip
from hints import place_hint
from models import ola, qwen
from models.paths import base_model, read_config
from run.arguments import PARSER, check_bounds
from run.io import file_lock, temp_dir
from run.launch import run_main
from run.processes import all_gather_object, print0, rank

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "toy_stage0.safetensors"
# stage: train, held-out; in RL a prompt comes back every 8 steps, or no hint could enter
NUM_ROWS = {0: (2048, 128), 1: (128, 128), 2: (128, 128), 3: (128, 128)}

# What the toy changes of the paper's 7B settings; a typed flag always wins.
OVERRIDES = {
    "sft": dict(lr=3e-4, steps=40, batch_size=16, lora_rank=0, train_towers=True),
    "rl": dict(
        lr=1e-4,
        steps=90,
        prompts_per_step=16,
        max_new_tokens=80,
        lora_rank=0,
        buffer_size=2000,
        eval_every=30,
    ),
    "media": dict(
        max_frames=16, max_pixels=64 * 64, max_audio_seconds=8.0
    ),  # 64: Ola's multiples of 32
}


# ---- questions ---------------------------------------------------------------------------------


def ask(rng, kind, seconds):
    """-> (fields of the row, the seconds to look at), or None if the clip has no clear answer."""
    num_seconds = len(seconds)
    shown = [shapes[0][1] if shapes else None for shapes, _ in seconds]  # color of the first shape
    if kind == "color at":
        k = int(rng.integers(num_seconds))
        question = f"Which color is shown in the {ORDINALS[k]} second?"
        hint = f"watch only the {ORDINALS[k]} second"
        return shown[k] and choice(rng, question, shown[k], hint, [k])
    if kind == "color after":
        k = int(rng.integers(num_seconds - 1))
        clear = (
            shown[k] and shown[k + 1] and shown.count(shown[k]) == 1 and shown[k] != shown[k + 1]
        )
        question = f"Which color comes right after {shown[k]}?"
        hint = f"find the {shown[k]} shape, then look one second later"
        return clear and choice(rng, question, shown[k + 1], hint, [k, k + 1])
    if kind.startswith("count"):
        toned = kind == "count at tone"
        count = sum(bool(c and (tone or not toned)) for c, (_, tone) in zip(shown, seconds))
        hint = "write a line for each second, then count the lines with a shape"
        hint += " and a tone" * toned
        question = f"How many shapes {'come with a tone' if toned else 'are shown'}?"
        return dict(question=question, answer=str(count), answer_type="number", hint=hint), []
    tone = str(rng.choice(list(TONES)))
    k = [i for i, (_, t) in enumerate(seconds) if t == tone]
    if len(k) != 1 or not shown[k[0]]:
        return None
    hint = f"the {tone} tone sounds in the {ORDINALS[k[0]]} second, look there"
    if kind == "color at tone":
        question = f"Which color is shown while the {tone} tone sounds?"
        return choice(rng, question, shown[k[0]], hint, k)
    question = f"What is where while the {tone} tone sounds?"
    answer = " | ".join(f"{place}: {color} {shape}" for place, color, shape in seconds[k[0]][0])
    return dict(question=question, answer=answer, answer_type="location", hint=hint), k


def choice(rng, question, color, hint, look):
    options = [str(c) for c in rng.permutation(list(COLORS))]
    row = dict(question=question, options=options, answer=color, answer_type="choice", hint=hint)
    return row, look


KINDS = {
    1: ("color at", "color after", "count shapes"),
    2: ("color at tone", "count at tone"),
    3: ("where at tone",),
}
WORDS = {1: ("color",), 2: ("color", "tone"), 3: ("place", "color", "shape", "tone")}
STYLES = {"full": 0.35, "short": 0.1, "hasty": 0.55}  # of the cold-start reasonings
SECONDS = {0: (2, 3, 4, 5), 1: (2, 3, 4, 5, 6), 2: (2, 3, 4, 5, 6), 3: (2, 3, 4)}  # clip lengths


def reasoning_text(rng, stage, seconds, fields, look, style):
    """-> (think, answer) in one of three styles; only "hasty" may be wrong."""
    steps = [f"{i + 1}: {describe(*second, WORDS[stage])}" for i, second in enumerate(seconds)]
    answer = fields["answer"]
    if style == "short" and look:
        steps = [steps[k] for k in look]
    if style != "hasty":
        return "\n".join([*steps, f"so {answer}"]), answer
    if fields["answer_type"] == "choice":  # a plausible answer, found without looking
        answer = str(rng.choice(fields["options"]))
    elif fields["answer_type"] == "number":
        answer = str(rng.integers(0, len(seconds) + 1))
    else:
        answer = f"{rng.choice(list(PLACES))}: {rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
    return f"it seems {answer}", answer


def make_row(rng, stage, name, split):
    """One row of the JSONL and the clip behind it. Stage 0 rows are of any stage's kinds."""
    family = stage or int(rng.integers(1, 4))
    num_seconds = int(rng.choice([n for n in SECONDS[stage] if n in SECONDS[family]]))
    kind, asked = str(rng.choice(KINDS[family])), None
    while not asked:  # clips until one has a clear answer
        seconds = random_seconds(rng, num_seconds, max_shapes=2 if family == 3 else 1)
        asked = ask(rng, kind, seconds)
    fields, look = asked
    row = dict(prompt_id=f"toy-{stage}-{split}-{name}", **fields)
    row |= dict(video=f"clips/{split}-{name}.mp4", use_audio=family > 1)
    tones = [f"{t or 'no'} tone in the {ORDINALS[i]} second" for i, (_, t) in enumerate(seconds)]
    if stage != 2:  # there it would stand in the prompt, and tell everything             [U16]
        row["audio_caption"] = ", ".join(tones)
    row["events"] = [describe(*second, WORDS[3]) for second in seconds]  # what the toy judge knows
    if stage == 0:
        hinted = rng.random() < 0.2  # so that the cold-started policy knows what a hint is for
        style = str(rng.choice(list(STYLES), p=list(STYLES.values()))) if not hinted else "full"
        row["reasoning"], row["answer"] = reasoning_text(rng, family, seconds, fields, look, style)
        if not hinted:
            del row["hint"]
    return row, seconds


def write_rows(folder, stage, num_train, num_test, seed):
    """Writes folder/{train,test}.jsonl and folder/clips; the folder appears only when complete."""
    part = temp_dir(folder)
    (part / "clips").mkdir()
    for split, count in (("train", num_train), ("test", num_test)):
        rng = np.random.default_rng([seed, stage, split == "test"])
        with open(part / f"{split}.jsonl", "w") as file:
            for i in tqdm(
                range(count), desc=f"toy stage {stage} {split} clips", disable=None, leave=False
            ):
                row, seconds = make_row(rng, stage, f"{i:05d}", split)
                write_clip(part / row["video"], seconds, rng)
                file.write(json.dumps(row) + "\n")
    part.rename(folder)


# ---- model -------------------------------------------------------------------------------------

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


def write_model(folder, weights, backbone="qwen"):
    """Writes a standard Hugging Face folder; `weights`: a safetensors file of a Qwen, None for random."""
    disable_progress_bar()
    if weights:
        with safe_open(weights, "pt") as file:
            tokenizer_json = file.metadata()["tokenizer"]
    else:
        tokenizer_json = make_tokenizer_json(toy_corpus(seed=0), vocab_size=640)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
    )
    torch.manual_seed(0)
    if backbone == "ola":
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


def ship_weights(folder):
    """A trained model folder -> WEIGHTS: bfloat16, with the tokenizer in its metadata."""
    state = qwen.Thinker.from_pretrained(folder).state_dict()
    tokenizer_json = AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    state = {k: v.bfloat16().contiguous() for k, v in state.items()}
    save_file(state, WEIGHTS, metadata={"tokenizer": tokenizer_json})


def is_toy(folder):
    """True for None (the default), the toy's folder, and every model trained from it."""
    if folder is None:
        return True
    config = Path(base_model(folder)) / "config.json"
    return config.is_file() and read_config(config).get("avatar_toy", False)


def once(folder, write, *given):
    """write(folder, *given), unless it is there, or another run is just making it."""
    if not folder.exists():
        with file_lock(folder.parent):
            if not folder.exists():
                write(folder, *given)


def defaults(args, stage, root=HERE / "toy"):
    """
    Makes what --model and --data leave to the toy (rank 0; the others wait).

    returns  (model folder, training rows, held-out rows)
    """
    folder = root / f"stage{stage}"
    if rank() == 0 and not args.model:
        once(root / "model", write_model, WEIGHTS)
    if rank() == 0 and not args.data:
        once(folder, write_rows, stage, *NUM_ROWS[stage], 0)
    all_gather_object(None)  # a barrier
    count = 0 if args.data else (folder / "train.jsonl").read_bytes().count(b"\n")
    if not args.data and count != NUM_ROWS[stage][0]:
        told = (
            f"{folder} was made with {count} training rows, not the {NUM_ROWS[stage][0]} of today"
        )
        print0(f"  {told}: remove it to have it made anew")
    return root / "model", folder / "train.jsonl", folder / "test.jsonl"


def judge(row, steps):
    """
    Stage 3's judge for the toy: is each reasoning step true of the clip?           [R.judge]

    row      the prompt's row, with `events`
    steps    list of str        the lines of the reasoning
    returns  list of float      1 if the step names a second and tells what happens in it, else 0

    It sees the reasoning and the clip's events, never the answer.
    """
    if "events" not in row:
        raise BadRow(
            f"row {row['prompt_id']}: no events: --judge toy knows only the toy's: give a URL"
        )
    scores = []
    for step in steps:
        number, _, said = step.partition(":")
        known = number.strip().isdecimal() and 1 <= int(number) <= len(row["events"])
        scores.append(float(known and said.strip() == row["events"][int(number) - 1]))
    return scores


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    flag = parser.add_argument
    flag("--out", default=str(HERE / "toy"), help="folder for the model and the stages")
    flag("--seed", type=int, default=0, help="of the clips and questions")
    flag("--stages", type=int, nargs="*", default=[0, 1, 2, 3], choices=[0, 1, 2, 3])
    flag("--num-train", type=int, help="training rows a stage (default: 2048 for 0, else 128)")
    flag(
        "--backbone",
        choices=["qwen", "ola"],
        default="qwen",
        help="whose architecture the model has",
    )
    flag("--random-init", action="store_true", help="random weights, not the shipped ones")
    flag("--ship", metavar="FOLDER", help=f"only pack a trained folder into {WEIGHTS.name}")
    args = parser.parse_args(argv)
    check_bounds(args, seed=0, num_train=1)
    if args.ship:
        ship_weights(args.ship)
        return
    out = Path(args.out)
    once(out / "model", write_model, None if args.random_init else WEIGHTS, args.backbone)
    for stage in args.stages:
        num_train, num_test = args.num_train or NUM_ROWS[stage][0], NUM_ROWS[stage][1]
        once(out / f"stage{stage}", write_rows, stage, num_train, num_test, args.seed)
    print(f"{out}: model, " + ", ".join(f"stage{s}" for s in args.stages))


if __name__ == "__main__":
    run_main(main, BadRow)
