"""
Reads the answers of completions: takes a completion apart, brings equal answers to one form,
measures how far two texts are apart. Standard library only: copy this file freely.

Training and evaluation read answers with the same two functions, split_completion and
normalize_answer; the accuracy reward and the self-consistency vote compare the same form.
An answer that cannot be read for certain is None. Time is linear in the length of the text.
"""

import math
import re
import unicodedata
from collections import Counter

# ---- the two blocks of a completion --------------------------------------------------------------


def split_completion(text):
    """
    Takes a completion apart into its reasoning and its answer.

    text       str           the completion without its prompt; tags are lower case
    returns    (reasoning, answer), each stripped, None where absent or empty
               reasoning     from the first <think> to the last </think>
               answer        the last innermost <answer>...</answer> after the last </think> [U12]

    Everything before the last </think> is reasoning, even if its <think> was part of the prompt.
    After a <think> that is not closed, everything is reasoning. Innermost means without a tag
    inside: <answer>A<answer>B</answer></answer> answers B (and fails the format).
    """
    reasoning = None
    think_start = text.find("<think>")
    think_end = text.rfind("</think>")
    if 0 <= think_start < think_end:
        reasoning = text[think_start + len("<think>") : think_end].strip() or None

    tail = text if think_end < 0 else text[think_end + len("</think>") :]
    # max: without any </answer>, rfind's -1 would mean "all but the last character"
    answer_start = tail.rfind("<answer>", 0, max(0, tail.rfind("</answer>")))
    if answer_start < 0 or "<think>" in tail:
        return reasoning, None
    answer = tail[answer_start + len("<answer>") : tail.find("</answer>", answer_start)]
    return reasoning, answer.strip() or None


def parse_answer(text):
    """The answer of a completion, or None: the second half of split_completion."""
    return split_completion(text)[1]


# ---- the same answer in plain characters ---------------------------------------------------------

_LATEX_TEXT = re.compile(r"\\(?:boxed|text(?:bf|it|rm)?|math(?:bf|rm))\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
_LATEX_MATH = re.compile(r"\$([^$]*)\$|\\\(([^\\]*)\\\)")
MAX_COMBINING = 30  # marks on one letter; composing many more takes quadratic time
_EDGES = ".,;:!?\"'()[]{}*_`“”‘’。、"  # not + - # %: "-5" is not "5" and "C#" is not "C"


def _plain_character(char):
    """A full-width letter as ASCII, a decimal digit of any script as 0-9."""
    if unicodedata.category(char) == "No":  # a power is no digit: 10² is not 102
        return char
    char = unicodedata.normalize("NFKC", char)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in char)


def _composed(text):
    """Letters and their accents as one character each: "e\u0301", as some systems write it, is "é"."""
    longest = run = 0
    for char in text:
        run = run + 1 if unicodedata.combining(char) else 0
        longest = max(longest, run)
    return unicodedata.normalize("NFC", text) if longest <= MAX_COMBINING else text


def _plain_text(text):
    r"""Removes LaTeX and full-width forms: \boxed{\text{B}}, $B$ and a full-width B become B."""
    if not text.isascii():
        text = "".join(_plain_character(char) for char in _composed(text))
    for _ in range(3):  # nested commands, from the inside out
        text = _LATEX_FRACTION.sub(r"\1/\2", text)
        text = _LATEX_TEXT.sub(r"\1", text)
    return _LATEX_MATH.sub(r"\1\2", text)


def _words(text):
    """Casefolded words without the punctuation at their edges."""
    words = [word.strip(_EDGES) for word in text.casefold().split()]
    return [word for word in words if word]


# ---- choice, multi: options and letters ----------------------------------------------------------

LETTERS = "ABCDEFGHIJ"
OPTION_PREFIX = re.compile(r"\s*\(?([A-Ja-j])[).:]+\s*")
_LEADING_LETTER = re.compile(  # "B", "(B", "**B", "option B", "The correct answer is: B"
    r"(?:(?:(?i:the|correct|right|best|final|answer|option|choice|letter|is)\b|选项?|答案|是)[\s:]*){0,6}"
    r"[(\[{*\"'`]*([A-Ja-j])(?!\w|['’]\w)"
)
_LETTER_END = re.compile(  # separates a letter from the words after it; a space does not ("A dog")
    r"[*\"'`]*(?:[)\]}][.:,]?|[:,、]|\.(?=[\s*]|$)|\s[-–—]\s|\s*\n)[*\"'`]*"
)
_LATER_LETTER = re.compile(  # a or i before a word is an article or a pronoun
    r"(?i)(?<!\w)(?<!\w['’.])(?:[b-hj]|[ai](?!\s+\w\w))(?!\w|['’.]\w)"
)
_SAYS_CORRECT = re.compile(  # "A is correct", "(A) is the right answer"
    r"(?i)[*\"'`)\]}]*\s+is\s+(?:the\s+)?(?:(?:correct|right|best)(?:\s+(?:answer|option|choice|one))?|answer)(?!\w)"
)
# between the answers of a multi answer; tried in this order, because an option may hold commas
_SEPARATORS = (r"[;|\n]", r"[,、]", r"[&+/]|\b(?i:and)\b")


def option_table(options):
    """
    -> {letter: text}, {} without options. Prefixes ("A. red") are removed if every option has its own.

    raises   ValueError   over 10 options, or letters that are not A..J
    """
    if not options:
        return {}
    table = options if isinstance(options, dict) else dict(zip(LETTERS, options))
    table = {str(letter).strip().upper(): str(text) for letter, text in table.items()}
    if isinstance(options, str) or len(table) != len(options) or set(table) - set(LETTERS):
        raise ValueError(f"options must be a list or dict of at most 10, A..J, got {options!r}")
    prefixes = {letter: OPTION_PREFIX.match(text) for letter, text in table.items()}
    if all(prefix and prefix[1].upper() == letter for letter, prefix in prefixes.items()):
        return {letter: text[prefixes[letter].end() :] for letter, text in table.items()}
    return table


def _option_words(options):
    """-> {letter: words of the option}; {letter: []} for A..J without options."""
    if not options:
        return {letter: [] for letter in LETTERS}
    return {letter: _words(_plain_text(text)) for letter, text in option_table(options).items()}


def _letters_of_option(text, table):
    """-> the letters whose option is this text."""
    words = _words(text)
    return [letter for letter, option in table.items() if words and option == words]


def _read_letter(text, table, strict):
    """One letter, or None. Strict: only the letter's own option text may follow it."""
    text = text.strip()
    if letters := _letters_of_option(text, table):
        return letters[0] if len(letters) == 1 else None

    lead = _LEADING_LETTER.match(text)
    letter = lead[1].upper() if lead else None
    if letter not in table:
        return None
    rest = text[lead.end() :]
    if phrase := _SAYS_CORRECT.match(rest):
        rest = rest[phrase.end() :]
    end = _LETTER_END.match(rest)
    if end:
        rest = rest[end.end() :]
    if not _words(rest):
        return letter
    if letters := _letters_of_option(rest, table):
        return letter if letter in letters else None
    if strict or not end:
        return None
    mentioned = {mention.upper() for mention in _LATER_LETTER.findall(rest)} & set(table)
    return letter if mentioned <= {letter} else None


def _read_letters(text, table, separators):
    """A frozenset of letters, or None as soon as one piece of the list cannot be read."""
    if letter := _read_letter(text, table, strict=bool(separators)):
        return frozenset(letter)
    compact = re.sub(r"[\s()\[\].,、;|&+/]", "", text)  # "AC", "A, C", "(A)(C)"
    if compact and set(compact) <= set(table):
        return frozenset(compact)
    if not separators:
        return None
    letters = set()
    for piece in {piece.strip() for piece in re.split(separators[0], text)} - {""}:
        letters_of_piece = _read_letters(piece, table, separators[1:])
        if letters_of_piece is None:
            return None
        letters |= letters_of_piece
    return frozenset(letters) or None


# ---- number --------------------------------------------------------------------------------------

_ONES = "zero one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def _spelled_numbers():
    """-> {"zero": 0.0, ..., "nine hundred ninety nine": 999.0}, without "and"."""
    names = _ONES + _TEENS
    for ten in _TENS:
        names += [ten, *(f"{ten} {one}" for one in _ONES[1:])]
    below_hundred = names[1:]
    for one in _ONES[1:]:
        names += [f"{one} hundred", *(f"{one} hundred {name}" for name in below_hundred)]
    return {name: float(value) for value, name in enumerate(names)}


_SPELLED = _spelled_numbers()
# words that change the number beside them: with one of them the number cannot be read
_CHANGING = "no not none minus negative thousand million billion dozen half third thirds quarters"
_NUMBER_WORDS = {*_CHANGING.split(), *" ".join(_SPELLED).split()}
_ANY_NUMBER = rf"(?:\S*\d|(?:{'|'.join(_ONES + _TEENS + _TENS)})\b)"
_UNCERTAIN = re.compile(  # "> 5", "at least 5", "5 or more", "5+", "+-5", "- 5", "5k", "5M"
    r"[<>≤≥±]|\+\s*[-−]|[-−–]\s+[$€£¥]?\d|\d\+|\d\s?[kKMB]\b|(?i:\bor\s+(?:more|less|fewer)\b)"
    rf"|(?i:\b(?:than|least|most|over|under|above|below|up\s+to)\s+{_ANY_NUMBER})"
)
_UNIT_POWER = re.compile(  # "5 km²" "5 m2" "9.8 m/s^2": the power belongs to the unit
    r"(\d\s?(?:[^\W\d_]{1,3}/)?(?:[µnmcdk]?m|in|ft|yd|mi|s))(?:\^?[23]|[²³])(?!\w)"
)
_NUMERAL = re.compile(  # "$1,234.5" "-3" "(5)" ".5" "1/2", any unit after it: "50%" "5km"
    r"[^\w.+-]*([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?"
    r"(?:[eE][+-]?[0-9]+)?)(?:/([0-9]+))?\D*"
)


def _read_number(text):
    """The only number of the text as a finite float, or None."""
    if _words(text) in (["no"], ["none"]):  # as the whole answer; inside a sentence it is no count
        return 0.0
    text = _UNIT_POWER.sub(r"\1", text)
    if _UNCERTAIN.search(text) or any(c.isnumeric() and not c.isascii() for c in text):
        return None
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-").casefold()
    text = re.sub(r"([+-])([$€£¥])", r"\2\1", text)  # "-$5" is "$-5"
    numerals = [word for word in text.split() if re.search("[0-9]", word)]
    words = re.findall(r"[a-z]+|[^a-z\s-]", text)  # a hyphen joins words, other punctuation parts
    places = [i for i, word in enumerate(words) if word in _NUMBER_WORDS]
    if len(numerals) + bool(places) != 1:
        return None
    if places:
        spelled = [word for word in words[places[0] : places[-1] + 1] if word != "and"]
        return _SPELLED.get(" ".join(spelled))

    match = _NUMERAL.fullmatch(numerals[0])
    if not match:
        return None
    numerator = float(match[1].replace(",", ""))  # 1e999 is inf
    denominator = float(match[2] or 1)
    if denominator == 0 or not (math.isfinite(numerator) and math.isfinite(denominator)):
        return None
    return numerator / denominator


# ---- yesno, text, location, ocr, free-form -------------------------------------------------------

_POLARITY = {word: "yes" for word in ("yes", "true", "y", "是")}
_POLARITY |= {word: "no" for word in ("no", "false", "n", "否")}
_NO_NOUN = {*_POLARITY, "and", "or", "but", "wait", "actually", "not", "i", "it", "that"}


def _read_yesno(text):
    """
    "yes" or "no" by the leading word, None if the other word follows. The "no" of "Yes, there is no
    sound" says what is absent and takes nothing back: as "No, there is no sound", it is read.
    """
    words = [(word.strip(_EDGES), word) for word in text.casefold().split()]
    words = [(bare, word) for bare, word in words if bare]
    leading = _POLARITY.get(words[0][0]) if words else None
    begins_sentence = leading and re.search(r"[,.;:!]\W*$", words[0][1])  # "Yes," or "Yes."
    for i, (bare, word) in enumerate(words):
        if _POLARITY.get(bare, leading) == leading:
            continue
        is_determiner = word == "no" and i + 1 < len(words) and words[i + 1][0] not in _NO_NOUN
        if not (begins_sentence and is_determiner):
            return None
    return leading


def _read_text(text):
    words = _words(text)
    # the last word stays: "vitamin A" is not "vitamin", and "A" alone is a text
    content = [word for word in words[:-1] if word not in ("a", "an", "the")]
    return " ".join(content + words[-1:]) or None


def _read_pairs(text):
    """A frozenset of (place, object), or None if one piece is no such pair."""
    pairs = set()
    for piece in re.split(r"[|;\n]|,(?=[^,:|;\n]*:)", text):  # a comma only before "place:"
        if not piece.strip():
            continue
        place, _, thing = piece.partition(":")
        pair = (_read_text(place), _read_text(thing))
        if None in pair:
            return None
        pairs.add(pair)
    return frozenset(pairs) or None


def _read_words(text):
    return tuple(_words(text)) or None


# ---- one form for equal answers ------------------------------------------------------------------

ANSWER_TYPES = ("choice", "multi", "yesno", "number", "text", "location", "ocr", "free-form")


def normalize_answer(answer, answer_type, options=None):
    """
    Brings equal answers to one form, for the accuracy reward and for the vote.

    answer       str or None   parsed answer
    answer_type  str           one of the eight below
    options      list, dict    "choice" and "multi" only: ["red"], ["A. red"] or {"A": "red"};
                 or None       at most 10; None: letters A..J only
    returns      hashable, or None when the answer cannot be read for certain
      choice     letter: "B" "(b)" "B) any words" "the answer is B" "B is correct" "选项B", or an
                 option's text, which goes first if it is itself a letter; None: a second letter or another
                 option's text after the letter, other words after a space alone ("A dog")
      multi      frozenset of letters: "A, C" "AC" "A and C", or texts with , ; | between them
      yesno      "yes" or "no" by the leading word; None if both are there, except for a "no" before
                 what is absent: "Yes, there is no sound" is yes
      number     float, the only number there: "-1,234.5" "-$5" "1/2" "twenty-one" (to 999); a
                 unit ("km²") or % is dropped, not converted; "5 of 10", "3-4", "5 million", "5k", "> 5", "at
                 least 5" and infinity are None; "no" and "none" are 0 as the whole answer
      text       casefolded str without articles and without punctuation at the edges of words;
                 accents as one character or two are the same
      location   frozenset of (place, object): "left: cat | right: dog", separated by | ;
                 newline, or a comma that a "place:" follows; no list of places is assumed
      ocr, free-form   tuple of casefolded words without punctuation at their edges
    raises       ValueError    unknown answer_type; options over 10 or with letters not A..J
    """
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"unknown answer_type {answer_type!r}, expected one of {ANSWER_TYPES}")
    if answer is None:
        return None
    text = _plain_text(answer)
    match answer_type:
        case "choice":
            return _read_letter(text, _option_words(options), strict=False)
        case "multi":
            return _read_letters(text, _option_words(options), _SEPARATORS)
        case "yesno":
            return _read_yesno(text)
        case "number":
            return _read_number(text)
        case "text":
            return _read_text(text)
        case "location":
            return _read_pairs(text)
        case "ocr" | "free-form":
            return _read_words(text)


def normalize_truth(truth, answer_type, options=None):
    """
    The true answer of a row in the form of normalize_answer.

    truth        str, int, float    choice: a letter, an option's text, or an int index from 0;
                 or list            multi: also a list of these
    raises       ValueError         a truth that cannot be read; as normalize_answer
    """
    if answer_type == "choice" and type(truth) is int:  # a bool is an int too, but no index
        letter = LETTERS[truth : truth + 1] if truth >= 0 else ""
        form = letter if letter in _option_words(options) else None
    elif answer_type == "multi" and isinstance(truth, (list, tuple)):
        form = frozenset(normalize_truth(part, "choice", options) for part in truth) or None
    else:
        # None is caught here, because str(None) would read as the number 0
        form = normalize_answer(None if truth is None else str(truth), answer_type, options)
    if form is None:
        raise ValueError(f"{truth!r} is not a valid {answer_type} answer for options {options!r}")
    return form


# ---- how far two texts are apart -----------------------------------------------------------------


def edit_distance(words, other_words, substitution_cost):
    """The least cost of edits from one list of words to the other; insert and delete cost 1."""
    row = list(range(len(other_words) + 1))
    for i, word in enumerate(words, 1):
        diagonal = row[0]
        row[0] = i
        for j, other in enumerate(other_words, 1):
            substituted = diagonal + substitution_cost * (word != other)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def rouge_f1(words, truth):
    """
    Mean F1 of ROUGE-1, ROUGE-2 (if the truth has two words) and ROUGE-L.

    words, truth   tuples of str, not empty
    returns        float in [0, 1]
    """
    # longest common subsequence: 2 LCS = both lengths - distance, if a substitution costs 2
    scores = [1 - edit_distance(words, truth, substitution_cost=2) / (len(words) + len(truth))]
    for n in range(1, min(2, len(truth)) + 1):
        ngrams = Counter(zip(*(words[i:] for i in range(n))))
        truth_ngrams = Counter(zip(*(truth[i:] for i in range(n))))
        shared = (ngrams & truth_ngrams).total()
        scores.append(2 * shared / (ngrams.total() + truth_ngrams.total()))
    return sum(scores) / len(scores)
