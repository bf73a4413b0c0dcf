"""
A page to look at items: frames, sound, question, reasoning, parsed answer, truth. One file that
holds all it shows; it runs no script, and every text in it is escaped: completions are hostile.
"""

import base64
import html
import io
import math

import numpy as np
from torchvision.io import encode_jpeg

import rewards
from data import clips

PICTURES = dict(fps=2.0, max_frames=6, max_pixels=112 * 112)  # six small frames
SOUND_RATE, SPEECH_RATE = 24000, 6000  # bits a second
STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
article { border-top: 1px solid #bbb; padding: 1em 0 } pre { white-space: pre-wrap; margin: .4em 0 }
img { margin-right: 4px } .wrong b, .failed b { color: #b00 } .right b { color: #070 }
audio { display: block; height: 32px } small { color: #666 }
#only-wrong:checked ~ .right, #only-wrong:checked ~ .open { display: none }
#only-failed:checked ~ .right, #only-failed:checked ~ .wrong, #only-failed:checked ~ .open
{ display: none }
"""


def write(path, title, records, roots, count, recipe):
    """
    Writes the page of at most `count` items, the wrong ones first.

    records   as eval.py keeps them
    roots     {a record's `file`: the folder that its media are relative to}; those of other files
              are not shown
    recipe    the evaluation's: how much sound, and whether media may lie outside
    """
    recipe = recipe._replace(**PICTURES)
    ranked = sorted(records, key=lambda r: (r["score"] is None, r["score"] or 0.0))[:count]
    parts = [article(record, roots.get(record["file"]), recipe) for record in ranked]
    only_rows = all(r["score"] is None and r["parsed"] is None for r in records)  # nobody was asked
    told = "rows, as the model gets them" if only_rows else "items, the wrong ones first"
    text = document(title, parts, f"{len(parts)} of {len(records)} {told}.")
    path.write_text(text, encoding="utf-8", errors="replace")  # half a character has no bytes


def document(title, parts, told):
    title = html.escape(title)
    choices = "".join(
        f'<input type="radio" name="show" id="{key}"{checked}><label for="{key}">{text}</label> '
        for key, checked, text in (
            ("everything", " checked", "all"),
            ("only-wrong", "", "wrong and failed"),
            ("only-failed", "", "failed: no answer"),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; media-src data:; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>"
        f"<p>{told}</p>\n{choices}\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def article(record, root, recipe):
    """One item as HTML."""
    score = record["score"]
    kind = "open" if score is None else "right" if score == 1 else "wrong"
    kind = "failed" if record["failure"] and score is not None else kind
    think, _ = rewards.split_completion(record["completion"] or "")
    told = {
        "question": record["prompt"] or record["question"],
        "reasoning": think,
        "completion": record["completion"] if not think else None,
        "answer": record["parsed"],
        "truth": record["truth"],
        "failure": record["failure"],
    }
    lines = [f"<b>{kind}{'' if score is None else f' {score:.2f}'}</b> "]
    lines.append(f"<small>{text(record['file'])} {text(record['prompt_id'])}</small>")
    lines.append(media(record, root, recipe))
    lines += [
        f"<div><small>{name}</small><pre>{text(value)}</pre></div>"
        for name, value in told.items()
        if value not in (None, "")
    ]
    return f'<article class="{kind}">{"".join(lines)}</article>'


def text(value):
    return html.escape(str(value), quote=True)


def media(record, root, recipe):
    """The frames, pictures and sound of an item, embedded; or why they are not there."""
    if root is None:
        return "<p><small>media not shown: of an earlier command</small></p>"
    try:
        clip = clips.decode_clip(record, root, recipe)
    except (ValueError, TypeError, AttributeError) as problem:  # what breaks the format holds these
        return f"<p><small>{text(problem)}</small></p>"
    pictures, sounds = encoded_clip(clip)
    shown = "".join(f'<img alt="" src="{picture}">' for picture in pictures)
    shown += "".join(f'<audio controls src="{sound}"></audio>' for sound in sounds)
    return f"<div>{shown}</div>"


def encoded_clip(clip, sound_bytes=math.inf):
    """
    What is in a Clip, as data URIs: pictures (JPEG), sounds (Opus).

    sound_bytes   of a sound: a long one gets fewer bits a second for it, down to what speech needs
    """
    pictures = [*clip.images, *(clip.frames if clip.frames is not None else ())]
    rates = [8 * sound_bytes * clips.AUDIO_RATE / max(len(sound), 1) for sound in clip.sounds]
    rates = [int(min(max(rate, SPEECH_RATE), SOUND_RATE)) for rate in rates]
    return (
        [data_uri("image/jpeg", jpeg(picture)) for picture in pictures],
        [data_uri("audio/ogg", ogg(*sound)) for sound in zip(clip.sounds, rates)],
    )


def data_uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(picture):
    """(3, H, W) uint8 -> bytes"""
    return encode_jpeg(picture.contiguous(), quality=70).numpy().tobytes()


def ogg(samples, bit_rate):
    """(S,) float32 at 16 kHz -> Opus, bytes"""
    import av  # only here

    buffer = io.BytesIO()
    # bitexact: the same bytes twice, with no random number of the stream
    with av.open(buffer, "w", format="ogg", options=dict(fflags="bitexact")) as container:
        stream = container.add_stream(
            "libopus", rate=clips.AUDIO_RATE, layout="mono", bit_rate=bit_rate
        )
        stream.codec_context.options = dict(
            compression_level="0"
        )  # a third of the time: a run waits for it
        frame = av.AudioFrame.from_ndarray(np.asarray(samples, np.float32)[None], "flt", "mono")
        frame.sample_rate = clips.AUDIO_RATE
        size = stream.codec_context.frame_size or clips.AUDIO_RATE // 50
        resampler = av.AudioResampler("flt", "mono", clips.AUDIO_RATE, size)  # only cuts it
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return buffer.getvalue()
