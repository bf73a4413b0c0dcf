"""
A captioner describes what is heard: the audio captions of stage 2.
"""

from teachers.client import plain

CAPTION = (
    "Describe what is heard in this recording in one or two short sentences: voices and what they "
    "say, music, other sounds, in the order in which they come, and how often. Say only what is "
    "heard. Reply with the description alone."
)


MAX_CAPTION = 120  # words


def find_caption(teacher, row):
    """The caption of a row's sound; None for a row without sound."""
    if not (row.get("audio") or row.get("use_audio")):
        return None

    def accept(reply):
        words = plain(reply).strip("\"' ").split()
        if not any(c.isalnum() for c in "".join(words)):
            raise ValueError("no words")
        return " ".join(words[:MAX_CAPTION]).removesuffix(".")

    return teacher.ask(row, ("audio",), CAPTION, 2 * MAX_CAPTION, accept)
