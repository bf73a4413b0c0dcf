"""
The rewards of AVATAR, arXiv:2508.03100: format, accuracy, self-consistency, judge, stage sum.
Standard library only: copy this file freely.

One parser, split_completion, serves training and evaluation; one canonical form,
normalize_answer, serves the accuracy reward and the vote. What cannot be read for certain is
None, and None never earns a reward. Time is linear in the length of the text.
"""

import math
import re
import unicodedata
from collections import Counter

PARTS = ("format", "acc", "self", "judge")

# ---- a completion: its two blocks and its format -------------------------------------------------


def split_completion(text):
    """
    Takes a completion apart: the one parser of every reward and of evaluation.

    text       str           the completion without its prompt; tags are lower case
    returns    (think, answer), each stripped, None where absent or empty
               think         from the first <think> to the last </think>
               answer        the last innermost <answer>...</answer> after the last </think> [U12]

    All before the last </think> is reasoning, also when its <think> stood in the prompt; a
    <think> left open makes all that follows reasoning. Innermost means no tag inside:
    <answer>A<answer>B</answer></answer> answers B (and fails the format).
    """
    think, think_start, think_end = None, text.find("<think>"), text.rfind("</think>")
    if 0 <= think_start < think_end:
        think = text[think_start + len("<think>") : think_end].strip() or None
    tail = text if think_end < 0 else text[think_end + len("</think>") :]
    # max: where no </answer> exists, rfind's -1 would mean "all but the last character"
    start = tail.rfind("<answer>", 0, max(0, tail.rfind("</answer>")))
    if start < 0 or "<think>" in tail:
        return think, None
    return think, tail[start + len("<answer>") : tail.find("</answer>", start)].strip() or None


def parse_answer(text):
    """The answer of a completion, or None: the second half of split_completion."""
    return split_completion(text)[1]


def format_reward(text):
    """
    R_format = +1 if the completion is <think>...</think><answer>...</answer>, else -1  [R.format]

    text       str           the completion without its prompt; tags are lower case
    returns    float         1.0 or -1.0; space around the blocks is allowed, an empty block is not
    """
    pieces = re.split(r"(</?(?:think|answer)>)", text)
    if pieces[1::2] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return -1.0
    before, think, between, answer, after = (piece.strip() for piece in pieces[::2])
    return 1.0 if think and answer and not (before or between or after) else -1.0


# ---- how an answer is written -------------------------------------------------------------------

_LATEX = re.compile(r"\\(?:boxed|text(?:bf|it|rm)?|math(?:bf|rm))\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
_MATH = re.compile(r"\$([^$]*)\$|\\\(([^\\]*)\\\)")


def _written(text):
    r"""The same in plain characters: \boxed{\text{B}}, $B$ and a full-width B are B; so are digits."""
    if not text.isascii():  # a power is no digit: 10² is not 102
        plain = [
            c if unicodedata.category(c) == "No" else unicodedata.normalize("NFKC", c) for c in text
        ]
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in plain)
    for _ in range(3):  # one inside the other
        text = _LATEX.sub(r"\1", _FRACTION.sub(r"\1/\2", text))
    return _MATH.sub(r"\1\2", text)


# ---- options and letters -------------------------------------------------------------------------

_LETTERS = "ABCDEFGHIJ"
_EDGES = ".,;:!?\"'()[]{}*_`“”‘’。、"  # not + - # %: "-5" is not "5" and "C#" is not "C"
OPTION_PREFIX = re.compile(r"\s*\(?([A-Ja-j])[).:]+\s*")
_LEAD = re.compile(  # "B", "(B", "**B", "option B", "The correct answer is: B"
    r"(?:(?:(?i:the|correct|right|best|final|answer|option|choice|letter|is)\b|选项?|答案|是)[\s:]*){0,6}"
    r"[(\[{*\"'`]*([A-Ja-j])(?!\w|['’]\w)"
)
_AFTER = re.compile(  # what parts a letter from the words after it; a space does not ("A dog")
    r"[*\"'`]*(?:[)\]}][.:,]?|[:,、]|\.(?=[\s*]|$)|\s[-–—]\s|\s*\n)[*\"'`]*"
)
_MENTION = re.compile(  # a letter by itself; a or i before a word is an article or a pronoun
    r"(?i)(?<!\w)(?<!\w['’.])(?:[b-hj]|[ai](?!\s+\w\w))(?!\w|['’.]\w)"
)
_SEPARATORS = (
    r"[;|\n]",
    r"[,、]",
    r"[&+/]|\b(?i:and)\b",
)  # tried in turn: an option may hold commas


def _plain(text):
    """Casefolded words without the punctuation at their edges, one space between them."""
    return " ".join(filter(None, (word.strip(_EDGES) for word in text.casefold().split())))


def _option_table(options):
    """{letter: plain text}. Prefixes ("A. red") go if every option has its own. None: letters."""
    if not options:
        return dict.fromkeys(_LETTERS, "")
    table = options if isinstance(options, dict) else dict(zip(_LETTERS, options))
    table = {str(letter).strip().upper(): str(text) for letter, text in table.items()}
    if isinstance(options, str) or len(table) != len(options) or set(table) - set(_LETTERS):
        raise ValueError(f"options must be a list or dict of at most 10, A..J, got {options!r}")
    prefixes = {letter: OPTION_PREFIX.match(text) for letter, text in table.items()}
    if all(prefix and prefix[1].upper() == letter for letter, prefix in prefixes.items()):
        table = {letter: text[prefixes[letter].end() :] for letter, text in table.items()}
    return {letter: _plain(_written(text)) for letter, text in table.items()}


def _letters_of_text(text, table):
    words = _plain(text)
    return [letter for letter, option in table.items() if words and option == words]


def _read_letter(text, table, strict):
    """One letter or None. Strict: nothing may follow the letter but the text of its option."""
    text = text.strip()
    if same := _letters_of_text(text, table):
        return same[0] if len(same) == 1 else None
    lead = _LEAD.match(text)
    if not lead or (letter := lead[1].upper()) not in table:
        return None
    rest = text[lead.end() :]
    after = _AFTER.match(rest)
    words = rest[after.end() :] if after else rest
    if not _plain(words):
        return letter
    if same := _letters_of_text(words, table):
        return letter if letter in same else None
    if strict or not after:
        return None
    mentioned = {mention.upper() for mention in _MENTION.findall(words)} & set(table)
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
    pieces = {piece.strip() for piece in re.split(separators[0], text)} - {""}
    found = [_read_letters(piece, table, separators[1:]) for piece in pieces]
    return frozenset().union(*found) or None if None not in found else None


# ---- numbers -------------------------------------------------------------------------------------

_ONES = "zero one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NAMES = _ONES + _TEENS + [f"{ten} {one}".removesuffix(" zero") for ten in _TENS for one in _ONES]
_NAMES += [f"{one} hundred {name}".removesuffix(" zero") for one in _ONES[1:] for name in _NAMES]
_SPELLED = {name: float(value) for value, name in enumerate(_NAMES)}  # zero .. 999, without "and"
# words that alter the number they stand beside: with one of them it is not a number we know
_ALTERING = "no not none minus negative thousand million billion dozen half third thirds quarters"
_NUMBER_WORDS = set(" ".join([_ALTERING, *_NAMES]).split())
_UNSURE = re.compile(  # "> 5", "at least 5", "5 or more", "5+", "+-5", "- 5", "5k", "5M"
    r"[<>≤≥±]|\+\s*[-−]|[-−–]\s+\d|\d\+|\d\s?[kKMB]\b|(?i:\bor\s+(?:more|less|fewer)\b)"
    r"|(?i:\b(?:than|least|most|over|under|above|below|up\s+to)\s+(?:\S*\d|(?:%s)\b))"
    % "|".join(_ONES + _TEENS + _TENS)
)
_NUMERAL = re.compile(  # "$1,234.5" "-3" "(5)" ".5" "1/2", any unit after it: "50%" "5km"
    r"[^\w.+-]*([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?"
    r"(?:[eE][+-]?[0-9]+)?)(?:/([0-9]+))?\D*"
)


def _read_number(text):
    """The one number of the text as a finite float, or None."""
    if _plain(text) in ("no", "none"):  # "no" inside a sentence is not a count
        return 0.0
    if _UNSURE.search(text) or any(c.isnumeric() and not c.isascii() for c in text):
        return None
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-").casefold()
    numerals = [word for word in text.split() if re.search("[0-9]", word)]
    words = re.findall(r"[a-z]+|[^a-z\s-]", text)  # a hyphen joins, other punctuation parts
    spelled = [i for i, word in enumerate(words) if word in _NUMBER_WORDS]
    if len(numerals) + bool(spelled) != 1:
        return None
    if spelled:
        span = [word for word in words[spelled[0] : spelled[-1] + 1] if word != "and"]
        return _SPELLED.get(" ".join(span))
    if not (match := _NUMERAL.fullmatch(numerals[0])):
        return None
    top, bottom = float(match[1].replace(",", "")), float(match[2] or 1)  # 1e999 is inf
    return top / bottom if bottom and math.isfinite(top) and math.isfinite(bottom) else None


# ---- the other readers ---------------------------------------------------------------------------


def _read_yesno(text):
    polarity = dict.fromkeys("yes true y 是".split(), "yes") | dict.fromkeys(
        "no false n 否".split(), "no"
    )
    words = _plain(text).split()
    said = {polarity[word] for word in words if word in polarity}
    return polarity.get(words[0]) if len(said) == 1 else None


def _read_text(text):
    words = _plain(text).split()
    # the last word stays: "vitamin A" is not "vitamin", and "A" alone is a text
    kept = [word for word in words[:-1] if word not in ("a", "an", "the")] + words[-1:]
    return " ".join(kept) or None


def _read_pairs(text):
    """A frozenset of (place, object); one piece that is no such pair makes the text unreadable."""
    pieces = re.split(r"[|;\n]|,(?=[^,:|;\n]*:)", text)  # a comma only before "place:"
    pieces = {piece.strip() for piece in pieces} - {""}
    pairs = frozenset(tuple(map(_read_text, piece.partition(":")[::2])) for piece in pieces)
    return pairs or None if all(map(all, pairs)) else None


_READERS = {
    "choice": lambda text, options: _read_letter(text, _option_table(options), strict=False),
    "multi": lambda text, options: _read_letters(text, _option_table(options), _SEPARATORS),
    "yesno": lambda text, options: _read_yesno(text),
    "number": lambda text, options: _read_number(text),
    "text": lambda text, options: _read_text(text),
    "location": lambda text, options: _read_pairs(text),
    "ocr": lambda text, options: tuple(_plain(text).split()) or None,
    "free-form": lambda text, options: tuple(_plain(text).split()) or None,
}


def normalize_answer(answer, answer_type, options=None):
    """
    Brings equal answers to one form, for the accuracy reward and for the vote.

    answer       str or None   parsed answer
    answer_type  str           one of the eight below
    options      list, dict    "choice" and "multi" only: ["red"], ["A. red"] or {"A": "red"};
                 or None       at most 10; None: letters A..J only
    returns      hashable, or None when the answer cannot be read for certain
      choice     letter: "B" "(b)" "B) any words" "the answer is B" "选项B", or an option's text,
                 which goes first if it is itself a letter; None: a second letter or another
                 option's text after the letter, other words after a space alone ("A dog")
      multi      frozenset of letters: "A, C" "AC" "A and C", or texts with , ; | between them
      yesno      "yes" or "no" by the leading word; both in one answer is None
      number     float, the only number there: "-1,234.5" "1/2" "twenty-one" (to 999); a unit
                 or % is dropped, not converted; "5 of 10", "3-4", "5 million", "5k", "> 5", "at
                 least 5" and infinity are None; "no" and "none" are 0 as the whole answer
      text       casefolded str without articles and without punctuation at the edges of words
      location   frozenset of (place, object): "left: cat | right: dog", separated by | ;
                 newline, or a comma that a "place:" follows; no list of places is assumed
      ocr, free-form   tuple of casefolded words without punctuation at their edges
    raises       ValueError    unknown answer_type; options over 10 or with letters not A..J
    """
    if answer_type not in _READERS:
        raise ValueError(f"unknown answer_type {answer_type!r}, expected one of {list(_READERS)}")
    return None if answer is None else _READERS[answer_type](_written(answer), options)


# ---- the rewards of an answer --------------------------------------------------------------------


def _normalize_truth(truth, answer_type, options):
    if answer_type == "choice" and type(truth) is int:  # bool is an int: not taken for an index
        letter = _LETTERS[truth : truth + 1] if truth >= 0 else ""
        form = letter if letter in _option_table(options) else None
    elif answer_type == "multi" and isinstance(truth, (list, tuple)):
        form = frozenset(_normalize_truth(part, "choice", options) for part in truth) or None
    else:
        # str(None) would read as the number 0
        form = normalize_answer(None if truth is None else str(truth), answer_type, options)
    if form is None:
        raise ValueError(f"truth {truth!r} is no {answer_type} answer for options {options!r}")
    return form


def _distance(said, truth, swap):
    """Least edits from one list of words to the other: +1, -1, or another word for `swap`."""
    row = list(range(len(truth) + 1))
    for i, word in enumerate(said, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(truth, 1):
            edits = row[j] + 1, row[j - 1] + 1, corner + swap * (word != other)
            corner, row[j] = row[j], min(edits)
    return row[-1]


def _rouge(said, truth):
    """Mean F1 of shared words, shared pairs (if the truth has one), longest common subsequence."""
    scores = [1 - _distance(said, truth, 2) / (len(said) + len(truth))]  # 2 LCS = both - distance
    for n in range(1, min(2, len(truth)) + 1):
        a, b = (Counter(zip(*(words[i:] for i in range(n)))) for words in (said, truth))
        scores.append(2 * (a & b).total() / (a.total() + b.total()))
    return sum(scores) / len(scores)


def accuracy_reward(answer, truth, answer_type, options=None):
    """
    R_acc = 1[a = y]                                    choice, yesno, text             [R.acc]
    R_acc = max(0, 1 - |a - y| / |y|), 1[a = y] if y=0  number
    R_acc = 2 |a & y| / (|a| + |y|)                     multi, location: F1 of two sets
    R_acc = max(0, 1 - edits / |y|)                     ocr: 1 - word error rate
    R_acc = mean of ROUGE-1, ROUGE-2, ROUGE-L (F1)      free-form                       [U21]
    Scores the parsed answer a against the truth y, both in the form of normalize_answer. [U11]

    answer       str or None        parsed answer; None scores 0
    truth        str, int, float    choice: a letter, an option's text, or an int index from 0;
                 or list            multi: also a list of these
    returns      float in [0, 1]
    raises       ValueError         a truth that cannot be read; as normalize_answer

    The truth is read first: accuracy_reward(None, ...) checks a row. A str truth equal to an
    option's text is that option even if it is also a letter; give the index in such rows.
    """
    truth = _normalize_truth(truth, answer_type, options)
    answer = normalize_answer(answer, answer_type, options)
    if answer is None:
        return 0.0
    if answer_type == "number" and truth != 0:
        return max(0.0, 1 - abs(answer - truth) / abs(truth))
    if answer_type == "ocr":
        return max(0.0, 1 - _distance(answer, truth, 1) / len(truth))
    if answer_type == "free-form":
        return _rouge(answer, truth)
    if answer_type in ("multi", "location"):
        return 2 * len(answer & truth) / (len(answer) + len(truth))
    return float(answer == truth)


def self_consistency_rewards(answers, mean_logprobs, answer_type, options=None):
    """
    y* = argmax_y (n_y, mean of l_i over a_i = y),  R_self_i = 1[a_i = y*]              [R.self]
    Takes the majority of one prompt's group for the truth; the likelihood decides ties only.

    answers        G of str or None   parsed answers, compared in the form of normalize_answer
    mean_logprobs  G of float, nats   l_i: mean log-likelihood of a completion's tokens
    returns        list of G floats   1.0 or 0.0; all 0 when no answer can be read
    raises         ValueError         lengths differ; NaN for an answer that votes

    [U13] None has no vote and no reward, however many there are. A lone readable answer wins: pair
    this reward with one that does not come from the group. A second tie goes to the first.
    """
    if len(answers) != len(mean_logprobs):
        raise ValueError(f"{len(answers)} answers but {len(mean_logprobs)} mean_logprobs")
    forms = [normalize_answer(answer, answer_type, options) for answer in answers]
    voters = {}
    for form, logprob in zip(forms, mean_logprobs):
        if form is not None:
            voters.setdefault(form, []).append(logprob)
    ranks = {form: (len(votes), math.fsum(votes) / len(votes)) for form, votes in voters.items()}
    if any(math.isnan(mean) for _, mean in ranks.values()):
        raise ValueError(f"NaN in mean_logprobs {mean_logprobs}")
    winner = max(ranks, key=ranks.get, default=None)
    return [float(form is not None and form == winner) for form in forms]


# ---- the sum ---------------------------------------------------------------------------------------


def reward_completions(row, texts, mean_logprobs, weights, judge):
    """
    R = sum_k w_k r_k                                                                  [R.stage]
    All parts of the reward for the completions of one prompt, and their sum.

    row            dict            `answer`, `answer_type`, `options` of the prompt
    texts          G of str        the completions
    mean_logprobs  G of float      mean log-likelihood of a completion's tokens, nats
    weights        dict of float   format, acc, self, judge: which parts count, and how much
    judge          callable(row, think) -> float in [0, 1]; asked only if its part counts; None is
                   "not judged", which is not zero
    returns        G of (R, {part: value}); R None: not judged, leave the completion out
    """
    answer_type, options = row["answer_type"], row.get("options")
    thinks, answers = zip(*map(split_completion, texts))
    votes = self_consistency_rewards(answers, mean_logprobs, answer_type, options)
    scored = []
    for text, think, answer, vote in zip(texts, thinks, answers, votes):
        accuracy = accuracy_reward(answer, row["answer"], answer_type, options)
        parts = dict(format=format_reward(text), acc=accuracy, self=vote)
        if "judge" in weights:
            parts["judge"] = judge(row, think)
        known = all(parts[part] is not None for part in weights)
        total = float(sum(w * parts[part] for part, w in weights.items())) if known else None
        scored.append((total, parts))
    return scored
