"""
Whether a hint gives the answer away [U9].

    python -m pytest tests/test_leaks.py
"""

import pytest

from teachers.leaks import hint_leak
from training.hint_visits import check_hint

COLORS = ["red", "blue", "green", "yellow"]
LEAKS = [
    # above a hundred, in words
    ("there are one hundred and twenty", "120", "number", None),
    ("one hundred twenty of them", "120", "number", None),
    ("a hundred and one dogs", "101", "number", None),
    ("three hundred and five", "305", "number", None),
    ("between one hundred and twenty", "20", "number", None),
    # a letter used as a choice
    ("The answer is B", "B", "choice", None),
    ("the answer is b.", "B", "choice", None),
    ("Answer: B", "B", "choice", None),
    ("Look at option B again", "B", "choice", None),
    ("consider option b again", "B", "choice", None),
    ("the last choice, (B), fits", "B", "choice", None),
    ("the last choice (b) fits", "B", "choice", None),
    ("B fits best", "B", "choice", None),
    ("it can only be **B**", "B", "choice", None),
    ("The answer is A.", "A", "choice", None),
    ("The answer is A", "A", "choice", None),
    ("option A is right", "A", "choice", None),
    ("the answer is a", "A", "choice", None),
    ("(A) or something else", "A", "choice", None),
    ("A is the only one left", "A", "choice", None),
    ("it is A, not C", "A", "choice", None),
    # the text of the right option
    ("watch for the blue shape", "B", "choice", COLORS),
    ("watch for the BLUE shape", "B", "choice", COLORS),
    ("it is 'blue'!", "(b)", "choice", COLORS),
    ("it is blue", "blue", "choice", COLORS),
    ("it is blue", "B", "choice", ["A. red", "B. blue"]),
    ("it is blue", "B", "choice", {"A": "red", "B": "blue"}),
    ("either red or blue", "B", "choice", COLORS),
    ("not red, not green, not yellow, so blue remains", "B", "choice", COLORS),
    ("compare red, blue, green and yellow in turn", "B", "choice", COLORS),  # cannot be told apart
    ("the sky is blue", "B. blue", "choice", COLORS),
    ("the sky is blue", "B. blue", "choice", None),
    ("count to two", "C", "choice", ["0", "1", "2"]),
    ("there are 2", "C", "choice", ["zero", "one", "two"]),
    ("two dogs bark", "A", "choice", ["2 dogs", "3 dogs"]),
    ("two dogs bark", 2, "choice", [2, 3]),
    ("listen to the dogs", "A", "choice", ["a dog", "a cat"]),
    ("of red, blue, green and yellow the answer is blue", "B", "choice", COLORS),
    ("red, blue, green, yellow: blue is correct", "B", "choice", COLORS),
    # all that is wrong
    ("neither red, nor green, nor yellow", "B", "choice", COLORS),
    ("rule out A, C and D", "B", "choice", COLORS),
    ("rule out A, (c) and yellow", "B", "choice", COLORS),
    # several right options
    ("C is one of them", "A, C", "multi", None),
    ("think of C", "AC", "multi", None),
    ("think of C", ["A", "C"], "multi", COLORS),
    ("green is one of them", "A and C", "multi", COLORS),
    ("green is one of them", ["red", "green"], "multi", COLORS),
    ("green is one of them", "red, green", "multi", COLORS),
    ("green is one of them", "red, green", "multi", None),
    ("think of C", "(A)(C)", "multi", None),
    # numbers
    ("there are 2 of them", "2", "number", None),
    ("there are two of them", "2", "number", None),
    ("Two.", "2.0", "number", None),
    ("it rings twice", "2", "number", None),
    ("count to 2", "two", "number", None),
    ("exactly one dog", "1", "number", None),
    ("there are twenty-two", "22", "number", None),
    ("there are three hundred", "300", "number", None),
    ("about 1,000 birds", "1000", "number", None),
    ("3.5 seconds", "3.50", "number", None),
    ("it takes 2s", "2 s", "number", None),
    ("it takes two seconds", "2 s", "number", None),
    ("half of it, 50 percent", "50%", "number", None),
    ("it drops to minus 3", "-3", "number", None),
    ("there are 2 dogs", 2, "number", None),
    # text
    ("listen to the church bell", "church bell", "text", None),
    ("listen to the Church-Bell!", "a church bell", "text", None),
    ("two church bells ring", "church bell", "text", None),
    ("a café, at night", "Café", "text", None),
    # location
    ("the red circle is on the left", "left: red circle | right: drum", "location", None),
    ("look left, there is a red circle", "Left: Red circle", "location", None),
    ("Look left. There is a red circle.", "left: a red circle", "location", None),
    ("a drum to the right", "left: red circle | right: drum", "location", None),
    ("a drum to the right", "left: red circle, right: drum", "location", None),
    ("two dogs in the center", "center: 2 dogs", "location", None),
    ("look at the left", "left", "location", None),
    # yes and no
    ("the answer is yes", "yes", "yesno", None),
    ("The correct answer: no.", "no", "yesno", None),
    ("The answer should be 'Yes'", "Yes", "yesno", None),
    ("Yes, it does", "yes", "yesno", None),
    ("No. Look again", "no", "yesno", None),
    ("yes is correct", "yes", "yesno", None),
    ("the answer is not yes", "no", "yesno", None),
    ("answer no here", "no", "yesno", None),
    ("the answer is true", "yes", "yesno", None),
    ("the answer is no", "B", "choice", ["Yes", "No"]),
    # an option by its place
    ("look at the second option again", "B", "choice", COLORS),
    ("the 2nd choice is worth a look", "B", "choice", COLORS),
    ("option two fits", "B", "choice", COLORS),
    ("option number 2 fits", "blue", "choice", COLORS),
    ("the first listed option", "A", "choice", COLORS),
    ("the last option", "D", "choice", COLORS),
    ("the middle option", "B", "choice", ["red", "blue", "green"]),
    ("the first and the third option are wrong, so is the last option", "B", "choice", COLORS[:3]),
    ("consider the fourth alternative", "A, D", "multi", COLORS),
    # in other words
    ("a pair of them rings", "2", "number", None),
    ("a couple of dogs", "2", "number", None),
    ("it rings once", "1", "number", None),
    ("a dozen birds", "12", "number", None),
    ("it rings thrice", "3", "number", None),
    ("there are none", "0", "number", None),
    ("the guitar is played by the man", "A", "choice", ["a man playing a guitar", "a dog barking"]),
    ("listen to the barks of a dog", "B", "choice", ["a man playing a guitar", "a dog barking"]),
    ("someone cut wood", "cutting wood", "text", None),
    ("the bell of a church", "church bell", "text", None),
    ("a girl who plays the flute, in the center", "center: girl playing flute", "location", None),
]
HARMLESS = [
    ("three hundred and five", "205", "number", None),
    ("first locate the object making the sound, then count", "2", "number", None),
    ("first locate the object making the sound, then count", "A", "choice", COLORS),
    ("A good start: watch the shapes while the high tone sounds", "A", "choice", COLORS),
    ("A good start: watch the shapes while the high tone sounds", "A", "choice", None),
    ("start with a list of sounds (a short one)", "A", "choice", None),
    ("choose a moment when the tone sounds", "A", "choice", None),
    ("to answer a question like this, listen first", "A", "choice", None),
    ("Pick the answer. A good start is to listen", "A", "choice", None),
    ("the answer is a high tone away", "A", "choice", None),
    ("FIND A SOUND FIRST", "A", "choice", None),
    ("what would I hear?", "I", "choice", None),
    ("listen to the B-flat tone", "B", "choice", COLORS),
    ("find the red shape, then look one second later", "B", "choice", COLORS),
    ("compare the colors in turn", "B", "choice", COLORS),
    ("look for the bluebird", "B", "choice", COLORS),
    ("look for the reddish one", "A", "choice", COLORS),
    ("it is not red, I think", "B", "choice", COLORS),
    ("there is no need to hurry", "B", "choice", ["Yes", "No"]),
    ("think of B", "A, C", "multi", COLORS),
    ("listen to each one", "1", "number", None),
    ("find the one that sounds, then go one by one", "1", "number", None),
    ("watch only the second second", "2", "number", None),
    ("watch the 2nd clip", "2", "number", None),
    ("there are 12 seconds, 2.5 of them silent", "2", "number", None),
    ("twenty-two frames", "2", "number", None),
    ("20 frames, 100 seconds", "2", "number", None),
    ("often listen to the weight", "10", "number", None),
    ("write a line for each second, then count the lines with a shape", "0", "number", None),
    ("listen to the bell", "church bell", "text", None),
    ("a bellows works hard", "bell", "text", None),
    ("the high tone sounds in the first second", "left: red circle", "location", None),
    ("go from left to right", "left: red circle | right: drum", "location", None),
    ("when is the red circle silent?", "left: red circle", "location", None),
    ("what is no longer there? say yes only if you hear it", "no", "yesno", None),
    ("the answer is no longer visible, so listen", "no", "yesno", None),
    ("there is no hurry; nod yes or no", "yes", "yesno", None),
    ("on the right no object moves", "no", "yesno", None),
    ("the answer is yes", "no", "yesno", None),  # wrong, but it does not give "no" away
    ("the second time it sounds, compare the options", "B", "choice", COLORS),
    ("first answer what sounds, then where", "B", "choice", COLORS),
    ("watch what the man does", "A", "choice", ["a man playing a guitar", "a man barking"]),
    ("listen to a single voice", "2", "number", None),
    ("look at both sides", "4", "number", None),
    ("", "B", "choice", COLORS),
    ("", "2", "number", None),
    ("listen", "?", "text", None),
    ("listen", "B", "choice", []),
]


@pytest.mark.parametrize("hint, answer, answer_type, options", LEAKS)
def test_leaks_are_refused(hint, answer, answer_type, options):
    reason = hint_leak(hint, answer, answer_type, options)
    assert isinstance(reason, str) and reason


@pytest.mark.parametrize("hint, answer, answer_type, options", HARMLESS)
def test_harmless_hints_pass(hint, answer, answer_type, options):
    assert hint_leak(hint, answer, answer_type, options) is None


def test_the_reason_names_what_was_found():
    assert "'2'" in hint_leak("there are two", "2", "number")
    assert "option B" in hint_leak("B fits", "B", "choice", COLORS)
    assert "blue" in hint_leak("it is blue", "B", "choice", COLORS)
    assert "left: drum" in hint_leak("left, a drum", "left: drum | right: cat", "location")


def test_a_leak_is_refused_once_and_told():
    row = dict(prompt_id="q", hint="it is red", answer="red", answer_type="text")
    refused, told = set(), []
    assert check_hint(row, refused, told.append) is None
    assert check_hint(row, refused, told.append) is None
    assert told == ["hint refused: q: it says 'red'"] and refused == {"q"}
    fine = row | dict(prompt_id="p", hint="look at the ball")
    assert check_hint(fine, refused, told.append) == "look at the ball"
    assert check_hint(dict(row, hint=None), set(), told.append) is None
