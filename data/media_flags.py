"""
The limits of media as flags, the same for every command, and the MediaConfig that they make.
"""

import argparse

from data.clips import MediaConfig
from run.arguments import check_bounds
from run.errors import UserError


def add_media_flags(parser, keeps_clips=True):
    """The media limits, the same for every entry point; and, where clips come again, the cache."""
    flag = parser.add_argument_group("media").add_argument
    flag("--fps", type=float, default=2.0, help="video frames per second")
    flag("--max-frames", type=int, default=32, help="even; more are thinned out (paper: 32)")
    flag("--max-pixels", type=int, default=128 * 28 * 28, help="pixels per frame [U17]")
    flag("--max-audio-seconds", type=float, default=120.0, help="of sound; longer is an error")
    flag("--max-prompt-tokens", type=int, default=16384, help="longer is an error, never cut")
    flag(
        "--allow-outside",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="media may lie outside the JSONL's folder (absolute paths, ..)",
    )
    if keeps_clips:
        flag("--cache-gb", type=float, default=4.0, help="GB of decoded or encoded clips in memory")


def media_config_from(args):
    recipe = MediaConfig(**{k: v for k, v in vars(args).items() if k in MediaConfig._fields})
    check_bounds(args, fps=1e-3, max_frames=2, max_pixels=28 * 28)
    check_bounds(args, max_audio_seconds=0.1, max_prompt_tokens=1)
    if recipe.max_frames % 2:
        raise UserError(
            f"--max-frames {recipe.max_frames}: give an even number: frames go in pairs"
        )
    return recipe
