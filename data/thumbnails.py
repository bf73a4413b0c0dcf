"""
A decoded clip as small JPEG pictures and Opus sounds in data URIs, to be embedded in a web page.
"""

import base64
import io
import math

import numpy as np

from data import clips

# of a MediaConfig: what a page shows of a clip is six small frames
THUMBNAIL_LIMITS = dict(fps=2.0, max_frames=6, max_pixels=112 * 112)
JPEG_QUALITY = 70
SOUND_BIT_RATE = 24000  # bits/s
SPEECH_BIT_RATE = 6000  # bits/s, the least at which speech can be understood


def clip_as_data_uris(clip, max_sound_bytes=math.inf):
    """
    A Clip -> (list of JPEG data URIs, list of Opus data URIs).

    max_sound_bytes   of each sound: a longer one gets a lower bit rate, down to SPEECH_BIT_RATE
    """
    pictures = list(clip.images)
    if clip.frames is not None:
        pictures += list(clip.frames)
    picture_uris = [data_uri("image/jpeg", encode_picture(picture)) for picture in pictures]

    sound_uris = []
    for samples in clip.sounds:
        seconds = max(len(samples), 1) / clips.AUDIO_RATE
        bit_rate = min(8 * max_sound_bytes / seconds, SOUND_BIT_RATE)
        bit_rate = int(max(bit_rate, SPEECH_BIT_RATE))
        sound_uris.append(data_uri("audio/ogg", encode_sound(samples, bit_rate)))
    return picture_uris, sound_uris


def data_uri(media_type, content):
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def encode_picture(picture):
    """(3, H, W) uint8 -> JPEG, bytes"""
    from torchvision.io import encode_jpeg  # slow to import, and only needed here

    return encode_jpeg(picture.contiguous(), quality=JPEG_QUALITY).numpy().tobytes()


def encode_sound(samples, bit_rate):
    """(S,) float32 at 16 kHz -> Opus in an Ogg container, bytes"""
    import av

    buffer = io.BytesIO()
    # bitexact: the same bytes each time, without the random serial number of a stream
    with av.open(buffer, "w", format="ogg", options=dict(fflags="bitexact")) as container:
        stream = container.add_stream(
            "libopus", rate=clips.AUDIO_RATE, layout="mono", bit_rate=bit_rate
        )
        # a third of the default's time: a training run waits for it
        stream.codec_context.options = dict(compression_level="0")

        frame = av.AudioFrame.from_ndarray(np.asarray(samples, np.float32)[None], "flt", "mono")
        frame.sample_rate = clips.AUDIO_RATE
        # Opus wants frames of one size: this resampler only cuts, the rate stays
        frame_size = stream.codec_context.frame_size or clips.AUDIO_RATE // 50
        resampler = av.AudioResampler("flt", "mono", clips.AUDIO_RATE, frame_size)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return buffer.getvalue()
