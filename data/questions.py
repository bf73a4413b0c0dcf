"""
Questions as other projects write them -> the question alone: its options taken out of the text, and
without another project's answer instructions and media placeholders.
"""

import re
from typing import NamedTuple

from answers import LETTERS

# ---- options -----------------------------------------------------------------------------------

# how a line begins that is an option: the mark, then the text
UPPER_CASE = re.compile(r"\s*(?:(?i:option)\s+)?(\(?([A-J])[).:]\s+\S.*)")
LOWER_CASE = re.compile(r"\s*\(?([a-j])[).]\s+(\S.*)")
NUMBERED = re.compile(r"\s*\(?(\d{1,2})[).]\s+(\S.*)")
# several options in one line: a mark follows a space, the first one the end of a sentence
INLINE = re.compile(r"(?<!\S)\(?([A-J])[).:]\s+(?=\S)")
SENTENCE_END = re.compile(r"[?.!:;]\s*$")
HEADING = re.compile(r"(?i)\n?[ \t]*(?:answer\s+)?(?:options|choices)\s*:[ \t]*$")
HEADING_BEFORE_OPTION = re.compile(
    r"(?im)^([ \t]*(?:answer\s+)?(?:options|choices)\s*:)[ \t]*(?=\(?[A-Ja-j1][).:]\s)"
)


class SplitQuestion(NamedTuple):
    text: str  # the question without its options and without answer instructions
    options: list  # of str, with their letters: "A. red"; [] if the question holds none
    removed: list  # of str: the answer instructions that were taken out
    is_numbered: bool = False  # whether the options were 1., 2., ...: an answer may be a number


def split_question(question):
    """
    Takes the options and the answer instructions of another project out of a question.

    Options stand in lines of their own ("A. red", "(A) red", "a) red", "1. red", "Option A: red") or
    in one line, with letters in their order. The last option ends where its line ends, or, if
    others take several lines, at an empty line or an answer instruction. What follows and is no
    answer instruction is put after the question: no text is lost.
    """
    question = HEADING_BEFORE_OPTION.sub(r"\1\n", question.strip())
    lines = question.split("\n")
    for pattern, marks in (
        (UPPER_CASE, LETTERS),
        (LOWER_CASE, LETTERS.lower()),
        (NUMBERED, [str(i) for i in range(1, 11)]),
    ):
        starts = option_lines(lines, pattern, marks)
        if starts:
            return _split_at_lines(lines, starts, pattern)
    split = _split_inline(lines)
    if split:
        return split
    text, removed = without_instructions(question)
    return SplitQuestion(text, [], removed)


def cut_options(question):
    """A question that holds its options -> the question, the options (a list of str)."""
    split = split_question(question)
    return (split.text, split.options) if split.options else (question, [])


def option_lines(lines, pattern, marks):
    """-> the numbers of the lines that begin with an option; [] if marks do not follow their order."""
    starts, marks_of_lines = [], []
    for number, line in enumerate(lines):
        match = pattern.match(line)
        if match:
            starts.append(number)
            marks_of_lines.append(_mark_of(match, pattern))
    count = len(marks_of_lines)
    in_order = count > 1 and marks_of_lines == list(marks[:count])
    return starts if in_order and starts[0] > 0 else []


def _mark_of(match, pattern):
    return match[2] if pattern is UPPER_CASE else match[1]


def _split_at_lines(lines, starts, pattern):
    ends = [*starts[1:], len(lines)]
    others_take_one_line = all(
        not any(line.strip() for line in lines[start + 1 : end])
        for start, end in zip(starts[:-1], ends[:-1])
    )
    ends[-1] = _end_of_last_option(lines, starts[-1], others_take_one_line)

    options = []
    for letter, start, end in zip(LETTERS, starts, ends):
        match = pattern.match(lines[start])
        first_line = match[1] if pattern is UPPER_CASE else f"{letter}. {match[2]}"
        options.append("\n".join([first_line, *lines[start + 1 : end]]).strip())
    text, removed = _text_around(lines[: starts[0]], lines[ends[-1] :])
    return SplitQuestion(text, options, removed, pattern is NUMBERED)


def _end_of_last_option(lines, start, others_take_one_line):
    """-> the number of the first line that is no longer part of the last option."""
    for number in range(start + 1, len(lines)):
        line = lines[number]
        if not line.strip() or INSTRUCTION.match(line):
            return number
        continues = line[0].isspace() or line[0].islower()
        if others_take_one_line and not continues:
            return number
    return len(lines)


def _split_inline(lines):
    """ "Which? A. red B. blue" -> SplitQuestion, or None."""
    for number, line in enumerate(lines):
        marks = list(INLINE.finditer(line))
        letters = "".join(mark[1] for mark in marks)
        if len(marks) < 2 or not LETTERS.startswith(letters):
            continue
        before = line[: marks[0].start()]
        if before.strip() and not SENTENCE_END.search(before):
            continue
        if not before.strip() and number == 0:
            continue  # it would be a question without a text
        ends = [mark.start() for mark in marks[1:]] + [len(line)]
        options = [
            line[mark.start() : end].strip().rstrip(";,").rstrip() for mark, end in zip(marks, ends)
        ]
        text, removed = _text_around([*lines[:number], before], lines[number + 1 :])
        # "... B. two. Answer with the letter.": the instruction stands in the last option's line
        last, instruction = _cut_last_sentence(options[-1])
        options[-1] = last
        return SplitQuestion(text, options, removed + instruction)
    return None


def _cut_last_sentence(option):
    first, separator, rest = option.rpartition(". ")
    if separator and len(first) > 2 and INSTRUCTION.match(rest):
        return first, [rest]
    return option, []


def _text_around(before, after):
    """The lines before the options and after them -> the question, the removed instructions."""
    text = HEADING.sub("", "\n".join(before).strip()).strip()
    text, removed = without_instructions(text)
    kept = []
    for line in after:
        if INSTRUCTION.match(line):
            removed.append(line.strip())
        elif line.strip():
            rest, more = without_instructions(line.strip())
            kept.append(rest)
            removed += more
    return "\n".join([text, *filter(None, kept)]), removed


# ---- answer instructions -----------------------------------------------------------------------

# a line that only says how to answer; it would contradict the instruction that rows.py adds
INSTRUCTION = re.compile(
    r"""(?ix) ^\s* (?:
        (?:the\s+)? (?:best\s+|correct\s+|final\s+|your\s+)? answer (?:\s+is)? \s* [:：]? \s*
      | (?:please\s+)? (?:answer|respond|reply) \b .*
        \b (?:letters?|options?|choices?|yes\s+or\s+no|words?|phrase|sentences?|number|directly) \b .*
      | (?:please\s+)? (?:provide|give|output|write|state|select|choose|pick) \b .*
        \b (?:letter|option|options|choices?|answer|multiple-choice) \b .*
      | .* </? (?:think|answer) > .*
    ) $"""
)
# a sentence that names the tags of an answer, from its beginning to the end of its line
TAG_SENTENCE = re.compile(r"(?i)(?:(?<=[.?!])[ \t]+|^|(?<=\n))[^.?!\n]*</?(?:think|answer)>[^\n]*")
# a last line about the form of an answer without options: only these are sure to be instructions
FORM_OF_ANSWER = re.compile(
    r"""(?ix) ^\s* (?:please\s+)? (?:answer|respond|reply) \b .*
        \b (?:yes\s+or\s+no|(?:single|one|few)\s+words?|short\s+phrase|or\s+phrase|number) \b .* $"""
)


def without_instructions(text):
    """A text -> the text without answer instructions; the list of what was taken out."""
    removed = []
    for match in TAG_SENTENCE.finditer(text):
        removed.append(match[0].strip())
    rest = TAG_SENTENCE.sub("", text).strip()
    if removed and not rest:
        return text, []  # the question is about the tags themselves
    lines = rest.split("\n")
    while len(lines) > 1 and (not lines[-1].strip() or FORM_OF_ANSWER.match(lines[-1])):
        last = lines.pop().strip()
        if last:
            removed.append(last)
    return "\n".join(lines).strip(), removed


# ---- media placeholders ------------------------------------------------------------------------

PLACEHOLDER = re.compile(r"<(video|audio|image|speech|sound)>")
AT_HEAD = re.compile(r"(?:\s*<(?:video|audio|image|speech|sound)>)+\s*")
AT_TAIL = re.compile(r"\s*(?:<(?:video|audio|image|speech|sound)>\s*)+$")
NAMES = dict(image="picture", video="video", audio="sound")


class PlaceholderError(ValueError):
    """The placeholders of a text are not as many as its media."""


def name_placeholders(texts, num_media):
    """
    The texts of a record's questions without its media placeholders: those at the head or the end of a
    text are cut, as media come before the question; in the place of others stands "picture 2".

    texts       list of str, the user's turns in their order
    num_media   {"video", "audio", "image": number of files}
    raises      PlaceholderError   there are placeholders, and not as many as media
    """
    placeholders = [
        _kind(match[1], num_media) for text in texts for match in PLACEHOLDER.finditer(text)
    ]
    counts = {kind: placeholders.count(kind) for kind in NAMES}
    if _fit(counts, num_media):
        return _named(texts, num_media)

    # those at the edges alone may be meant, and the others be words: "the <image> tag of HTML"
    edges = [_cut_edges(text) for text in texts]
    cut = [_kind(kind, num_media) for _, kinds in edges for kind in kinds]
    if cut and _fit({kind: cut.count(kind) for kind in NAMES}, num_media):
        return [text for text, _ in edges]
    in_texts = ", ".join(f"{n} <{kind}>" for kind, n in counts.items() if n)
    media = ", ".join(f"{n} {kind}" for kind, n in num_media.items() if n) or "none"
    raise PlaceholderError(f"placeholders: {in_texts}; media: {media}")


def _kind(name, num_media):
    """The kind of medium that a placeholder stands for."""
    kind = "audio" if name in ("speech", "sound") else name
    if kind == "image" and not num_media["image"] and num_media["video"]:
        return "video"  # LLaVA writes <image> for a video
    return kind


def _fit(counts, num_media):
    for kind, count in counts.items():
        expected = num_media[kind]
        if kind == "audio" and not expected and num_media["video"]:
            expected = num_media["video"]  # <audio> without a file is the video's own sound
        if count not in (0, expected):
            return False
    return True


def _cut_edges(text):
    """-> the text without the placeholders at its edges; their names."""
    kinds = []
    for pattern in (AT_HEAD, AT_TAIL):
        match = pattern.match(text) if pattern is AT_HEAD else pattern.search(text)
        if match:
            kinds += PLACEHOLDER.findall(match[0])
            text = text[: match.start()] + text[match.end() :]
    return text.strip(), kinds


def _named(texts, num_media):
    numbers = dict.fromkeys(NAMES, 0)  # of the placeholders so far
    result = []
    for text in texts:
        head = AT_HEAD.match(text)
        start = head.end() if head else 0
        tail = AT_TAIL.search(text, start)
        end = tail.start() if tail else len(text)
        for match in PLACEHOLDER.finditer(text, 0, start):
            numbers[_kind(match[1], num_media)] += 1

        pieces, position = [], start
        for match in PLACEHOLDER.finditer(text, start, end):
            kind = _kind(match[1], num_media)
            numbers[kind] += 1
            name = NAMES[kind]
            words = f"{name} {numbers[kind]}" if num_media[kind] > 1 else f"the {name}"
            before = text[position : match.start()]
            after = text[match.end() : match.end() + 1]
            pieces += [before, "" if not before or before[-1].isspace() else " ", words]
            pieces.append(" " if after.isalnum() else "")
            position = match.end()
        pieces.append(text[position:end])
        for match in PLACEHOLDER.finditer(text, end):
            numbers[_kind(match[1], num_media)] += 1
        result.append("".join(pieces).strip())
    return result
