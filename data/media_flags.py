"""
The limits of media as flags, the same for every command, and the MediaConfig that they make.
"""

import argparse

from data.clips import MediaConfig
from run.arguments import check_bounds
from run.errors import UserError


def add_media_flags(parser, keeps_clips=True):
    """
    The media limits, the same for every command.

    keeps_clips   whether the command reads clips again and again: then it has a cache
    """
    flag = parser.add_argument_group("media").add_argument
    flag("--fps", type=float, default=2.0, help="video frames per second")
    flag(
        "--max-frames",
        type=int,
        default=32,
        help="frames per video, an even number; a longer video is sampled less often (paper: 32)",
    )
    flag(
        "--max-pixels",
        type=int,
        default=128 * 28 * 28,
        help="pixels per frame after resizing [U17]",
    )
    flag(
        "--max-audio-seconds",
        type=float,
        default=120.0,
        help="seconds of sound; longer sound is an error, never cut",
    )
    flag(
        "--max-prompt-tokens",
        type=int,
        default=16384,
        help="tokens of a prompt; a longer one is an error, never cut",
    )
    flag(
        "--allow-outside",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="allow media outside the JSONL's folder (absolute paths, ..)",
    )
    if keeps_clips:
        flag("--cache-gb", type=float, default=4.0, help="GB of decoded or encoded clips in memory")


def check_media_flags(args):
    """Each command calls it where it parses its flags. raises UserError"""
    check_bounds(args, fps=1e-3, max_frames=2, max_pixels=28 * 28)
    check_bounds(args, max_audio_seconds=0.1, max_prompt_tokens=1)
    if args.max_frames % 2:
        raise UserError(f"--max-frames {args.max_frames}: give an even number: frames go in pairs")


def media_config_from(args):
    """The flags of add_media_flags -> MediaConfig"""
    return MediaConfig(
        fps=args.fps,
        max_frames=args.max_frames,
        max_pixels=args.max_pixels,
        max_audio_seconds=args.max_audio_seconds,
        max_prompt_tokens=args.max_prompt_tokens,
        allow_outside=args.allow_outside,
    )
