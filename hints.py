"""
Hints, arXiv:2508.03100: when one enters and leaves, where it stands, whether it gives the answer
away; as a command, it has a teacher write them. Imported, Python and torch only: copy it freely.

    python hints.py --data IN --out OUT --teacher http://localhost:8000/v1 \\
        --teacher-model Qwen/Qwen2.5-VL-72B-Instruct

A prompt that stays Hard while the policy has stopped moving on it yields zero reward for ever. A
short strategic suggestion, computed beforehand by a teacher, gets it off the ground.

A hint changes the text of a prompt, never its prompt_id: that stays the key of everything.
"""

import json
import re
import sys
import unicodedata

import torch


def behavior_kl(logprobs, old_logprobs, completion_mask):
    """
    KL(b || pi) ~ mean_t [exp(d_t) - 1 - d_t],   d_t = log pi(y_t) - log b(y_t)      [HINT.KL]
    How far the present policy has moved from the one that sampled these completions.

    logprobs         (B, T) float         nats, present policy
    old_logprobs     (B, T) float         nats, behaviour policy b, as stored
    completion_mask  (B, T) bool or 0/1   1 up to and including EOS
    returns          float >= 0           nats per token; d is clamped to [-20, 20]
    raises           ValueError           no valid token: unknown is not "near"

    The samples are b's, and E_b[exp(d)] = 1, so the mean estimates KL(b || pi) and not KL(pi || b).
    """
    shapes = [tuple(x.shape) for x in (logprobs, old_logprobs, completion_mask)]
    assert len(set(shapes)) == 1 and logprobs.ndim == 2, f"expected three (B, T), got {shapes}"
    mask = completion_mask.bool()
    if not mask.any():
        raise ValueError(f"no valid token in a completion_mask of shape {tuple(mask.shape)}")
    # select before subtracting: pads may hold -inf; on the CPU for the sake of float64
    new, old = (x.detach()[mask].cpu().double() for x in (logprobs, old_logprobs))
    d = (new - old).clamp(-20, 20)
    return (torch.expm1(d) - d).mean().item()


class HintSchedule:
    """
    enter: Hard at `patience` visits in a row and KL(b || pi) < kl_threshold;
    leave: at the first visit that finds the prompt outside Hard                      [HINT]

    patience      int >= 1     visits of a prompt, not steps
    kl_threshold  float > 0    nats per token; inf enters on any known KL
    raises        ValueError   out of range, or an unknown tier

    Hinted rewards do not count in a prompt's mean reward, so a prompt sampled only with its hint
    would keep its old mean and never leave Hard: hence every second visit is plain (`due`).
    """

    def __init__(self, patience, kl_threshold):
        if patience < 1 or not kl_threshold > 0:
            raise ValueError(f"need patience >= 1, kl > 0, got {patience} and {kl_threshold}")
        self.patience, self.kl_threshold = patience, kl_threshold
        self.entered = self.withdrawn = 0  # totals
        self._visits = {}  # prompt_id -> visits in Hard without a break
        self._active = {}  # prompt_id -> visits since its hint entered, in order of entry

    def needs_kl(self, prompt_id, tier):
        """Whether this visit could enter: only then is behavior_kl worth a forward pass."""
        patient = self._visits.get(prompt_id, 0) + 1 >= self.patience
        return tier == "hard" and patient and prompt_id not in self._active

    def observe(self, prompt_id, tier, behavior_kl):
        """
        One call per visit of a prompt, with its present tier.                       [HINT]

        behavior_kl  float or None   nats per token; None = unknown (nothing stored): no entry
        returns      "entered" | "withdrawn" | None
        """
        if tier not in ("hard", "medium", "easy"):
            raise ValueError(f"unknown tier {tier!r} of {prompt_id}")
        if tier != "hard":
            self._visits.pop(prompt_id, None)
            left = self._active.pop(prompt_id, None) is not None
            self.withdrawn += left
            return "withdrawn" if left else None
        could_enter = self.needs_kl(prompt_id, tier)
        self._visits[prompt_id] = self._visits.get(prompt_id, 0) + 1
        if prompt_id in self._active:
            self._active[prompt_id] += 1
        # a nan compares false: a broken KL does not enter either
        elif could_enter and behavior_kl is not None and behavior_kl < self.kl_threshold:
            self._active[prompt_id] = 0
            self.entered += 1
            return "entered"
        return None

    def active(self, prompt_id):
        """Whether the prompt has its hint; `due` says whether the present visit carries it."""
        return prompt_id in self._active

    def due(self, prompt_id):
        """After observe: whether this visit carries the hint, from entry on every second one."""
        return self._active.get(prompt_id, 1) % 2 == 0

    @property
    def active_prompts(self):
        """The prompts that have a hint now, in order of entry."""
        return list(self._active)

    def state_dict(self):
        """Plain lists and numbers: torch.load(weights_only=True) reads it."""
        visits, active = (list(map(list, d.items())) for d in (self._visits, self._active))
        return {"visits": visits, "active": active, "totals": [self.entered, self.withdrawn]}

    def load_state_dict(self, state):
        """Continue as the saved schedule would have; patience and kl_threshold stay our own."""
        self._visits, self._active = dict(state["visits"]), dict(state["active"])
        self.entered, self.withdrawn = state["totals"]


def place_hint(question, hint):
    """The text of the user turn: the hint stands before the question, which stays as it is."""
    return f"Hint: {hint.strip().removesuffix('.')}.\n{question}"


# ---- leaks: what an answer could look like inside a hint

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


# ---- a teacher writes them

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

    teacher   teachers.Teacher
    attempts  int             replies asked for, until one is no leak [U9]
    returns   str, at most MAX_WORDS words on one line
    raises    chat.NoAnswer   also if every attempt was refused; else as teacher.ask
    """
    import data
    from chat import NoAnswer
    from teachers import plain

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
        reason = hint_leak(hint, *data.truth(row))
        if not any(c.isalnum() for c in hint):
            reason = "it has no words"
        elif len(hint.split()) > MAX_WORDS:
            reason = f"it has over {MAX_WORDS} words"
        if not reason:
            return hint
        refused = f"\n\nThis hint was refused, since {reason}: {hint[:300]}\nWrite another."
    told = f"row {row['prompt_id']}: no hint in {attempts} attempts: at last {reason}"
    raise NoAnswer(f"{told}: raise --attempts")  # the replies so far are kept: as they were


def parse_args(argv=None):
    import argparse

    import teachers
    from run import PARSER

    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    teachers.add_flags(parser, "teacher")
    parser.add_argument(
        "--attempts", type=int, default=5, help="replies a row, until one is no leak"
    )
    return parser.parse_args(argv)


def main():
    import data
    import teachers

    args = parse_args()
    teacher = teachers.from_args(args, args.teacher, args.teacher_model)
    find = lambda row: ask_hint(teacher, row, max(args.attempts, 1))  # noqa: E731
    keep = lambda row, hint: hint_leak(hint, *data.truth(row))  # noqa: E731
    try:
        counts = teachers.fill(teacher, args.data, args.out, "hint", find, keep, args.concurrency)
    finally:
        teacher.close()
    sys.exit(1 if counts["without"] else 0)


if __name__ == "__main__":
    from run import main_guard

    main_guard(main)
