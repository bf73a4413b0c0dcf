"""
Whether a hint gives the answer away: such a hint is refused before its first use.        [U9]
Standard library only: copy this file freely.
"""

import re
import unicodedata

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
NUMBERS = (NUMBERS + "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred".split()
NUMBERS = {word: str(i) for i, word in enumerate(NUMBERS)}
WORDS_FOR = {"none nothing": 0, "once single lone sole": 1, "twice pair couple double duo": 2}
WORDS_FOR |= {"thrice trio triple triplet": 3, "quartet": 4, "dozen": 12}
NUMBERS |= {word: str(i) for words, i in WORDS_FOR.items() for word in words.split()}
NUMBERS |= {word: f"{i}0" for i, word in enumerate(TENS, 2)}
# a "one" that counts nothing: "the one that sounds", "one by one"
PRONOUN = r"\bone by one\b|\b(?:the|each|every|which|this|that|no) one\b|\bone (?:of|at|another)\b"
YESNO = {"yes": "(?:yes|true|not no|not false)", "no": "(?:no|false|not yes|not true)"}
YESNO |= {"true": YESNO["yes"], "false": YESNO["no"]}
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
COMMON = set(
    "a an the of in on at to is are be and or with by for from it its that this as".split()
)


def _plain(text):
    """Casefolded words, one space between; 2, "two" and 2.0 are one word; no leading article."""
    text = unicodedata.normalize("NFKC", str(text)).casefold()
    text = re.sub(PRONOUN, " ", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))  # 1,000
    words = re.findall(r"\d+(?:st|nd|rd|th)\b|\d*\.?\d+|[^\W\d_]+", text)
    text = " ".join(re.sub(r"\.0+$|(\.\d*?)0+$", r"\1", NUMBERS.get(w, w)) for w in words)
    text = re.sub(r"\b([2-9])0 ([1-9])\b", r"\1\2", text)  # twenty two: "20 2" -> "22"
    text = re.sub(r"\b([1-9]) 100\b", r"\g<1>00", text)
    return re.sub(r"^(?:an?|the) (?=.)", "", text)


def _names_letter(hint, letter):
    """Whether an option letter is used as one: "B", "(b)", "option b", but not the article A."""
    # A or I is a letter before a word only if that word cannot follow the article or the pronoun
    after = r"(?!\s+(?!(?:is|and|or|because|since|fits|matches)\b)\w)" if letter in "AI" else ""
    lower = rf"(?:\(|\b(?i:answer|option|choice|letter)s?(?:\s+(?:is|be))?\W+){letter.lower()}"
    return bool(re.search(rf"(?:\b{letter}|{lower})\b(?!-\w){after}", hint))


def _says(hint, text):
    """Whether the hint holds text as whole words; yes and no, common words, only when stated."""
    text, words = _plain(text), _plain(hint)
    if said := YESNO.get(text):
        link = r"(?: (?:is|be|should|must|would|with|to|the|here|therefore|clearly))*"
        idiom = r"(?! (?:longer|more|less|other|doubt)\b)"  # "the answer is no longer visible"
        stated = rf"\b(?:answer|reply|respond|choose|pick|say){link} {said}\b{idiom}"
        stated += rf"|\b{said} is (?:the )?(?:correct|right|answer)\b"
        alone = rf"\W*{said}\s*(?:[,.:;!]|$)"
        return bool(re.search(stated, words) or re.match(alone, hint.casefold()))
    if len(text) == 1 and text.isalpha():
        return _names_letter(hint, text.upper())
    # "100 and 20" are two numbers, or one
    joined = lambda found: f"{found[1]}{found[2]:0>2}"  # noqa: E731
    words += " . " + re.sub(r"\b([1-9])00 (?:and )?([1-9]\d?)\b", joined, words)
    return bool(text and re.search(rf"(?<!\S){re.escape(text)}(?:e?s)?(?!\S)", words))  # plural


def _stems(text):
    """The words that carry a text, without their endings."""
    words = (re.sub(r"(?<=\w{3})(?:ing|ed|es|s|ly|e)$", "", w) for w in _plain(text).split())
    return {re.sub(r"([b-df-hj-np-tv-z])\1$", r"\1", w) for w in words if w not in COMMON}


def _tells(hint, text, others=()):
    """Whether the hint says text, or most of the words that tell it from the other texts."""
    if _says(hint, text):
        return True
    if _plain(text) in YESNO or len(_plain(text)) < 2:
        return False
    own = _stems(text).difference(*map(_stems, others))
    said = len(own & _stems(hint))
    return bool(own) and said >= (len(own) if len(own) < 3 else 0.75 * len(own))


def _counts_to(hint, i, count):
    """Whether the hint points at option i of `count` by its place: "the second option"."""
    thing = r"(?:option|choice|answer|alternative|candidate)s?"
    place = f"{ORDINALS[i]}|{i + 1}(?:st|nd|rd|th)" + "|last|final|bottom" * (i + 1 == count)
    place += "|top" * (i == 0) + "|middle" * (2 * i + 1 == count)
    more = rf"(?:(?:and|or|the|last|\d+(?:st|nd|rd|th)|{'|'.join(ORDINALS)}) )*"  # of several
    number = rf"\b{thing} (?:(?:number|no|is|the) )*(?:{i + 1}|{place})\b"
    return bool(re.search(rf"\b(?:{place}) {more}(?:\w+ )?{thing}\b|{number}", _plain(hint)))


def hint_leak(hint, answer, answer_type, options=None):
    """
    Whether a hint gives the answer away: such a hint is refused before its first use.   [U9]

    answer       str, or a list of str for "multi"
    answer_type  "choice" | "multi" | "yesno" | "number" | "text" | "location"
    options      list or dict of texts, or None; "A." in front of a text is ignored
    returns      str, the reason, or None if the hint is harmless

    Refused: a right letter, or its place ("the second option"); the text of a right option, also
    in a list of all options ("not red, not green, so blue") or with its words turned about; all
    wrong options; the text; the number, as digits or as a word; place and object of one pair of a
    location. Synonyms it cannot know. In doubt it refuses: a new hint is cheap, a leak is not.
    """
    if answer_type == "location":
        pairs = [piece.partition(":") for piece in re.split(r"[|;\n]|,(?=[^,]*:)", answer)]
        told = [p for p in pairs if _tells(hint, p[0]) and (not p[1] or _tells(hint, p[2]))]
        return f"it says {''.join(told[0]).strip()!r}" if told else None
    if answer_type not in ("choice", "multi"):
        number = re.search(r"\d\S*", _plain(answer)) if answer_type == "number" else None
        told = _says(hint, number[0]) if number else _tells(hint, answer)
        return f"it says {str(answer)!r}" if told else None

    table = options if isinstance(options, dict) else dict(zip("ABCDEFGHIJ", options or []))
    label = r"^\s*\(?[A-Ja-j][.):]+\s*(?=\S)"
    table = {letter.upper(): re.sub(label, "", str(text)) for letter, text in table.items()}
    multi = answer_type == "multi"
    if not isinstance(answer, (list, tuple)):
        answer = re.split(r"[,;|]|\band\b", answer) if multi else [answer]
    right = set()
    for part in map(str, answer):
        text, compact = _plain(re.sub(label, "", part)), re.sub(r"\W", "", part)
        same = {letter for letter in table if _plain(table[letter]) == text}
        letters = (
            set(compact.upper()) if len(compact) == 1 or multi and compact.isupper() else set()
        )
        right |= same or letters
        if not (same or letters) and _tells(hint, text):
            return f"it says {part!r}"
    named = [letter for letter in sorted(right | set(table)) if _names_letter(hint, letter)]
    for i, (letter, text) in enumerate(table.items()):
        others = [other for key, other in table.items() if key != letter]
        if _tells(hint, text, others) or i < 10 and _counts_to(hint, i, len(table)):
            named.append(letter)
    if told := [letter for letter in named if letter in right]:
        return f"it names option {told[0]} ({table.get(told[0])})"
    if set(table) - right and set(table) - right <= set(named):
        return "it names every wrong option"
    return None


def usable_hint(row, refused, tell):
    """
    The row's hint, unless it gives the answer away: then it is refused, once.

    refused  set of prompt_ids whose hint is of no use; grows
    tell     callable(str)
    returns  str or None
    """
    q, hint = row["prompt_id"], row.get("hint")
    if hint and q not in refused:
        if reason := hint_leak(hint, row["answer"], row["answer_type"], row.get("options")):
            refused.add(q)
            tell(f"hint refused: {q}: {reason}")
    return None if q in refused else hint
