"""
Clips with known content: in each second coloured shapes are shown at the left, center or right, while
a high tone, a low tone or silence is heard.
"""

import numpy as np

COLORS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230)}
COLORS["yellow"] = (230, 210, 40)
SHAPES = ("circle", "square", "triangle")
PLACES = {"left": 10, "center": 28, "right": 46}  # x of the shape's centre, pixels of 56
TONES = {"low": 300.0, "high": 1500.0}  # Hz
SIZE, VIDEO_FPS, AUDIO_RATE = 56, 4, 24000  # pixels, frames/s, samples/s


def draw_frame(shapes, rng):
    """shapes: list of (place, color, shape) -> (SIZE, SIZE, 3) uint8, on a noisy grey ground."""
    frame = rng.normal(60, 2, (SIZE, SIZE, 3))
    y, x = np.mgrid[:SIZE, :SIZE]
    for place, color, shape in shapes:
        dx, dy = x - PLACES[place], y - 28
        if shape == "circle":  # an outline: told from the others at 17 pixels
            inside = (dx**2 + dy**2 <= 81) & (dx**2 + dy**2 >= 30)
        elif shape == "square":
            inside = (abs(dx) <= 8) & (abs(dy) <= 8)
        else:
            inside = (dy <= 8) & (dy >= -9) & (abs(dx) <= (dy + 9) * 0.45)
        frame[inside] = COLORS[color]
    return frame.clip(0, 255).astype(np.uint8)


def write_clip(path, seconds, rng):
    """seconds: list of (shapes, tone), one second each -> an H.264 + AAC mp4."""
    t = np.arange(AUDIO_RATE) / AUDIO_RATE
    audio = rng.normal(0, 0.003, (len(seconds), AUDIO_RATE))
    for second, (_, tone) in zip(audio, seconds):
        if tone:
            fade = np.minimum(1, np.minimum(t, 1 - t) * 20)  # 50 ms, no clicks
            second += 0.3 * fade * np.sin(2 * np.pi * TONES[tone] * rng.uniform(0.95, 1.05) * t)
    frames = (draw_frame(shapes, rng) for shapes, _ in seconds for _ in range(VIDEO_FPS))
    write_mp4(path, frames, SIZE, audio.ravel(), AUDIO_RATE)


def write_mp4(path, frames, size, audio, audio_rate):
    """
    frames      iterable of (size, size, 3) uint8, VIDEO_FPS a second
    audio       (n,) float in -1..1, audio_rate samples a second
    """
    import av  # a model can be made without it

    with av.open(str(path), "w") as container:
        video = container.add_stream(
            "libx264", rate=VIDEO_FPS, options={"preset": "ultrafast", "crf": "20", "threads": "1"}
        )
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        sound = container.add_stream(
            "aac", rate=audio_rate, layout="mono", options={"aac_coder": "fast"}
        )
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(audio.reshape(1, -1).astype(np.float32), "fltp", "mono")
        frame.sample_rate = audio_rate
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def random_seconds(rng, num_seconds, max_shapes):
    """A clip's content: each second up to `max_shapes` shapes in different places, and a tone."""
    seconds = []
    for _ in range(num_seconds):
        count = 0 if rng.random() < 0.2 else int(rng.integers(1, max_shapes + 1))
        places = sorted(rng.choice(3, count, replace=False))  # left to right
        shapes = [
            (list(PLACES)[p], str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)))
            for p in places
        ]
        seconds.append((shapes, [None, "low", "high"][rng.integers(3)]))
    return seconds


def describe(shapes, tone, words):
    """One second in words. words: which of "place", "color", "shape" and "tone" to name."""
    named = [i for i, word in enumerate(("place", "color", "shape")) if word in words]
    picture = ", ".join(" ".join(shape[i] for i in named) for shape in shapes) or "nothing"
    if "tone" not in words:
        return picture
    return f"{picture}; {tone or 'no'} tone"
