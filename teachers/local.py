"""
A Hugging Face folder that is asked about clips in this process, as chat.py asks a server.
"""

import threading
from pathlib import Path

import torch
import torchvision

from run.errors import UserError


class Local:
    """A Hugging Face folder in this process; one question at a time."""

    def __init__(self, folder, device):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder} is no model folder and no http(s) URL: give one of them")
        try:
            self.processor = AutoProcessor.from_pretrained(folder)
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from None
        self.model = self.model.to(device).eval().requires_grad_(False)
        if hasattr(self.processor.image_processor, "crop_to_patches"):  # InternVL: a frame, a tile
            self.processor.image_processor.crop_to_patches = False
        newest = max(path.stat().st_mtime_ns for path in Path(folder).iterdir())
        self.name, self.lock = f"{Path(folder).resolve()}@{newest}", threading.Lock()

    def parts(self, clip):
        picture = torchvision.transforms.functional.to_pil_image
        frames = [] if clip.frames is None else list(clip.frames)
        parts = [dict(type="image", image=picture(x)) for x in [*clip.images, *frames]]
        parts += [dict(type="audio", audio=audio) for audio in clip.sounds]
        return parts + frame_times(clip)

    @torch.no_grad()
    def chat(self, clip, text, max_tokens, temperature, seed, shape):
        content = [*clip, dict(type="text", text=text)]
        with self.lock, torch.random.fork_rng(enabled=temperature > 0):
            inputs = self.processor.apply_chat_template(
                [dict(role="user", content=content)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.model.device)
            inputs = {
                k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()
            }
            start, draws = inputs["input_ids"].shape[1], dict(do_sample=False)
            if temperature > 0:
                torch.manual_seed(seed)
                draws = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
            if shape:
                allowed = spelled(shape[1], self.processor.tokenizer, start)
                draws["prefix_allowed_tokens_fn"] = allowed
            ids = self.model.generate(**inputs, max_new_tokens=max_tokens, **draws)
        return self.processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def spelled(pieces, tokenizer, start):
    """-> callable(batch, ids) for generate: the tokens that may follow, so that `pieces` result."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    pieces = [
        [encode(x) for x in ([piece] if isinstance(piece, str) else piece)] for piece in pieces
    ]

    def allowed(_, ids):
        said = ids[start:].tolist()
        for piece in pieces:
            whole = next((x for x in piece if said[: len(x)] == x), None)
            if whole is None:
                return sorted({x[len(said)] for x in piece if x[: len(said)] == said})
            said = said[len(whole) :]
        return [tokenizer.eos_token_id]

    return allowed


def frame_times(clip):
    """A part that tells when the frames were on show, which pictures do not say by themselves."""
    if clip.frames is None:
        return []
    times = ", ".join(f"{(i + 0.5) / clip.fps:.2f}" for i in range(len(clip.frames)))
    return [dict(type="text", text=f"Frames of one video, at the seconds {times}.")]
