"""
Whether a hint gives the answer away: such a hint is refused before its first use.        [U9]
Standard library only: copy this file freely.
"""

import re
import unicodedata

# ---- words in one form ---------------------------------------------------------------------------

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
_ONES = (_ONES + "fifteen sixteen seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred".split()
_COUNT_WORDS = {  # words that say a count without naming a number
    "0": "none nothing",
    "1": "once single lone sole",
    "2": "twice pair couple double duo",
    "3": "thrice trio triple triplet",
    "4": "quartet",
    "12": "dozen",
}
NUMBERS = {word: str(i) for i, word in enumerate(_ONES)}
NUMBERS |= {word: f"{i}0" for i, word in enumerate(_TENS, 2)}
for _digits, _words_for in _COUNT_WORDS.items():
    NUMBERS |= {word: _digits for word in _words_for.split()}
# a "one" that counts nothing: "the one that sounds", "one by one"
_PRONOUN = r"\bone by one\b|\b(?:the|each|every|which|this|that|no) one\b|\bone (?:of|at|another)\b"
_COMMON = set(
    "a an the of in on at to is are be and or with by for from it its that this as".split()
)


def _plain(text):
    """Casefolded words, one space between; 2, "two" and 2.0 are one word; no leading article."""
    text = unicodedata.normalize("NFKC", str(text)).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,000
    text = re.sub(_PRONOUN, " ", text)
    words = re.findall(r"\d+(?:st|nd|rd|th)\b|\d*\.?\d+|[^\W\d_]+", text)
    words = [NUMBERS.get(word, word) for word in words]
    words = [re.sub(r"\.0+$|(\.\d*?)0+$", r"\1", word) for word in words]  # 2.0, 2.50
    text = " ".join(words)
    text = re.sub(r"\b([2-9])0 ([1-9])\b", r"\1\2", text)  # twenty two: "20 2" -> "22"
    text = re.sub(r"\b([1-9]) 100\b", r"\g<1>00", text)
    return re.sub(r"^(?:an?|the) (?=.)", "", text)


def _stems(text):
    """The words that carry a text, without their endings."""
    stems = set()
    for word in _plain(text).split():
        stem = re.sub(r"(?<=\w{3})(?:ing|ed|es|s|ly|e)$", "", word)
        if stem not in _COMMON:
            stems.add(re.sub(r"([b-df-hj-np-tv-z])\1$", r"\1", stem))  # "runn" of "running"
    return stems


# ---- what a hint says ----------------------------------------------------------------------------

_YES = "(?:yes|true|not no|not false)"
_NO = "(?:no|false|not yes|not true)"
_YESNO = {"yes": _YES, "true": _YES, "no": _NO, "false": _NO}
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


def _names_letter(hint, letter):
    """Whether an option letter is used as one: "B", "(b)", "option b", but not the article A."""
    after = ""
    if letter in "AI":  # a letter only before words that cannot follow the article or the pronoun
        after = r"(?!\s+(?!(?:is|and|or|because|since|fits|matches)\b)\w)"
    introduced = r"\b(?i:answer|option|choice|letter)s?(?:\s+(?:is|be))?\W+"
    lower = rf"(?:\(|{introduced}){letter.lower()}"
    return bool(re.search(rf"(?:\b{letter}|{lower})\b(?!-\w){after}", hint))


def _states(hint, polarity):
    """Whether the hint states yes or no as the answer: "the answer is no", "No, ..."."""
    words = _plain(hint)
    link = r"(?: (?:is|be|should|must|would|with|to|the|here|therefore|clearly))*"
    idiom = r"(?! (?:longer|more|less|other|doubt)\b)"  # "the answer is no longer visible"
    stated = rf"\b(?:answer|reply|respond|choose|pick|say){link} {polarity}\b{idiom}"
    confirmed = rf"\b{polarity} is (?:the )?(?:correct|right|answer)\b"
    alone = rf"\W*{polarity}\s*(?:[,.:;!]|$)"
    return bool(re.search(rf"{stated}|{confirmed}", words) or re.match(alone, hint.casefold()))


def _says(hint, text):
    """Whether the hint holds text as whole words; yes and no only where they are stated."""
    text = _plain(text)
    if text in _YESNO:
        return _states(hint, _YESNO[text])
    if len(text) == 1 and text.isalpha():
        return _names_letter(hint, text.upper())
    words = _plain(hint)
    # "100 and 20" are two numbers, or one
    joined = re.sub(
        r"\b([1-9])00 (?:and )?([1-9]\d?)\b", lambda match: f"{match[1]}{match[2]:0>2}", words
    )
    plural = r"(?:e?s)?"
    return bool(
        text and re.search(rf"(?<!\S){re.escape(text)}{plural}(?!\S)", f"{words} . {joined}")
    )


def _gives_away(hint, text, others=()):
    """Whether the hint says text, or most of the words that distinguish it from the other texts."""
    if _says(hint, text):
        return True
    if _plain(text) in _YESNO or len(_plain(text)) < 2:
        return False
    own = _stems(text)
    for other in others:
        own -= _stems(other)
    num_said = len(own & _stems(hint))
    num_needed = len(own) if len(own) < 3 else 0.75 * len(own)
    return bool(own) and num_said >= num_needed


def _points_at(hint, i, count):
    """Whether the hint points at option i of `count` by its place: "the second option"."""
    thing = r"(?:option|choice|answer|alternative|candidate)s?"
    place = f"{_ORDINALS[i]}|{i + 1}(?:st|nd|rd|th)"
    if i == 0:
        place += "|top"
    if 2 * i + 1 == count:
        place += "|middle"
    if i + 1 == count:
        place += "|last|final|bottom"
    others = rf"(?:(?:and|or|the|last|\d+(?:st|nd|rd|th)|{'|'.join(_ORDINALS)}) )*"  # of several
    ordinal = rf"\b(?:{place}) {others}(?:\w+ )?{thing}\b"
    number = rf"\b{thing} (?:(?:number|no|is|the) )*(?:{i + 1}|{place})\b"
    return bool(re.search(rf"{ordinal}|{number}", _plain(hint)))


# ---- hint and answer -----------------------------------------------------------------------------

_LABEL = r"^\s*\(?[A-Ja-j][.):]+\s*(?=\S)"  # "A." in front of an option's text


def hint_leak(hint, answer, answer_type, options=None):
    """
    Whether a hint gives the answer away: such a hint is refused before its first use.   [U9]

    answer       str, or a list of str for "multi"
    answer_type  "choice" | "multi" | "yesno" | "number" | "text" | "location"
    options      list or dict of texts, or None; "A." in front of a text is ignored
    returns      str, the reason, or None if the hint is harmless

    Refused: a right letter, or its place ("the second option"); the text of a right option, also
    in a list of all options ("not red, not green, so blue") or with its words in another order; all
    wrong options; the text; the number, as digits or as a word; place and object of one pair of a
    location. It knows no synonyms. In doubt it refuses: a new hint is cheap, a leak is not.
    """
    if answer_type == "location":
        return _location_leak(hint, answer)
    if answer_type in ("choice", "multi"):
        return _option_leak(hint, answer, answer_type == "multi", options)
    number = re.search(r"\d\S*", _plain(answer)) if answer_type == "number" else None
    is_leak = _says(hint, number[0]) if number else _gives_away(hint, answer)
    return f"it says {str(answer)!r}" if is_leak else None


def _location_leak(hint, answer):
    for pair in re.split(r"[|;\n]|,(?=[^,]*:)", answer):
        place, colon, thing = pair.partition(":")
        if _gives_away(hint, place) and (not colon or _gives_away(hint, thing)):
            return f"it says {pair.strip()!r}"
    return None


def _option_leak(hint, answer, is_multi, options):
    table = options if isinstance(options, dict) else dict(zip("ABCDEFGHIJ", options or []))
    table = {letter.upper(): re.sub(_LABEL, "", str(text)) for letter, text in table.items()}

    # ---- the right letters; a part of the answer that is no option is looked for as text
    parts = answer
    if not isinstance(answer, (list, tuple)):
        parts = re.split(r"[,;|]|\band\b", answer) if is_multi else [answer]
    right = set()
    for part in [str(part) for part in parts]:
        text = _plain(re.sub(_LABEL, "", part))
        letters = {letter for letter in table if _plain(table[letter]) == text}
        compact = re.sub(r"\W", "", part)  # "B", "AC"
        if not letters and (len(compact) == 1 or (is_multi and compact.isupper())):
            letters = set(compact.upper())
        right |= letters
        if not letters and _gives_away(hint, text):
            return f"it says {part!r}"

    # ---- the letters that the hint names, by letter, text or place
    named = [letter for letter in sorted(right | set(table)) if _names_letter(hint, letter)]
    for i, (letter, text) in enumerate(table.items()):
        others = [other for key, other in table.items() if key != letter]
        if _gives_away(hint, text, others) or (i < 10 and _points_at(hint, i, len(table))):
            named.append(letter)
    for letter in named:
        if letter in right:
            return f"it names option {letter} ({table.get(letter)})"
    wrong = set(table) - right
    if wrong and wrong <= set(named):
        return "it names every wrong option"
    return None
