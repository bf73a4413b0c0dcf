"""
A teacher writes the hints: one short strategic suggestion a row, that does not give the answer away.
"""

import json
import re

from data.rows import answer_spec
from teachers.chat import NoAnswer
from teachers.client import plain
from teachers.leaks import hint_leak

PROMPT = """\
Above is a clip, if there is one. Below is a question about it, with its answer.

{request}

A student fails at this question. Write one short strategic hint: what to look at or listen to, \
and in which order, such as "first locate the object making the sound, then count". One sentence, \
at most {max_words} words. It must not give the answer away: no option or its letter, no part of \
the answer in other words, no count, nothing that rules options out. Reply with the hint alone."""


MAX_WORDS = 40


def ask_hint(teacher, row, attempts):
    """
    A hint for a row, from all that is known of it: question, options, answer, caption, frames.

    teacher   ask.Teacher
    attempts  int             replies asked for, until one is no leak [U9]
    returns   str, at most MAX_WORDS words on one line
    raises    chat.NoAnswer   also if every attempt was refused; else as teacher.ask
    """

    keys = ("question", "options", "answer", "audio_caption")
    request = json.dumps({key: row[key] for key in keys if row.get(key)}, indent=1)
    text, refused = PROMPT.format(request=request, max_words=MAX_WORDS), ""
    for attempt in range(attempts):
        temperature = 0.8 if attempt else 0.0
        reply = teacher.ask(
            row, ("frames",), text + refused, 3 * MAX_WORDS, plain, temperature, attempt
        )
        hint = re.sub(r"^(?i:(?:strategic )?hint)\s*[:\-]\s*", "", reply.strip("\"' ")).strip(
            "\"' "
        )
        reason = hint_leak(hint, *answer_spec(row))
        if not any(c.isalnum() for c in hint):
            reason = "it has no words"
        elif len(hint.split()) > MAX_WORDS:
            reason = f"it has over {MAX_WORDS} words"
        if not reason:
            return hint
        refused = f"\n\nThis hint was refused, since {reason}: {hint[:300]}\nWrite another."
    told = f"row {row['prompt_id']}: no hint in {attempts} attempts: at last {reason}"
    raise NoAnswer(f"{told}: raise --attempts")  # the replies so far are kept: as they were
