"""
Rewards and the one answer parser: hand-worked values, hostile replies, oracles, a fuzz loop.

python -m pytest tests/test_rewards.py
"""

import itertools
import math
import random
import re
import unicodedata

import pytest

import answers
import rewards
import toy
from rewards import (
    accuracy_reward,
    format_reward,
    normalize_answer,
    parse_answer,
    self_consistency_rewards,
)
from teachers import judge

COLORS = ["red", "blue", "green", "dark red"]
TYPES = ("choice", "multi", "yesno", "number", "text", "location", "ocr", "free-form")
TRUTHS = {
    "choice": "B",
    "multi": "A, C",
    "yesno": "yes",
    "number": 5,
    "text": "a violin",
    "location": "left: cat | right: dog",
    "ocr": "No parking, 8-18 h",
    "free-form": "a dog runs after a ball",
}


# ------------------------------------------------------------------------------------------
# reading a completion


@pytest.mark.parametrize(
    "text, think, answer",
    [
        ("<think>look</think><answer>B</answer>", "look", "B"),
        (" <think>\n look \n</think>\n<answer>\n B \n</answer> ", "look", "B"),
        ("<answer>B</answer>", None, "B"),
        ("B", None, None),
        ("", None, None),
        ("<answer></answer>", None, None),
        ("<answer>  \n </answer>", None, None),
        ("<think></think><answer>B</answer>", None, "B"),
        # the last pair counts, also when it is empty
        ("<answer>A</answer><answer>B</answer>", None, "B"),
        ("<answer>A</answer> so <answer> </answer>", None, None),
        # nested and unclosed: the last innermost well-formed pair
        ("<answer>A<answer>B</answer></answer>", None, "B"),
        ("<answer>A<answer>B</answer>", None, "B"),
        ("<answer>A</answer>B</answer>", None, "A"),
        ("<answer>A</answer><answer>B", None, "A"),
        ("<answer>A", None, None),
        ("A</answer>", None, None),
        ("</answer>A<answer>", None, None),
        # an answer inside the reasoning is reasoning
        ("<think><answer>A</answer></think>", "<answer>A</answer>", None),
        ("<think><answer>A</answer></think><answer>B</answer>", "<answer>A</answer>", "B"),
        ("<think>x<answer>A</think></answer>", "x<answer>A", None),
        ("<think>x</think><answer>A</answer></think>", "x</think><answer>A</answer>", None),
        # the <think> may stand in the prompt: all before the last </think> is reasoning
        ("<answer>A</answer> no </think><answer>B</answer>", None, "B"),
        ("<answer>A</answer></think>", None, None),
        # a <think> left open makes the rest reasoning
        ("<think>x<answer>A</answer>", None, None),
        ("<answer>A</answer><think>", None, None),
        ("<think>x</think><answer>A</answer><think>y<answer>B</answer>", "x", None),
        ("</think>x<think><answer>A</answer>", None, None),
        ("<think>x</think>y<think>z</think><answer>A</answer>", "x</think>y<think>z", "A"),
        # tags are exact
        ("<ANSWER>A</ANSWER>", None, None),
        ("<answer >A</answer >", None, None),
        ("&lt;answer&gt;A&lt;/answer&gt;", None, None),
    ],
)
def test_split_completion(text, think, answer):
    assert rewards.split_completion(text) == (think, answer)
    assert parse_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>B</answer>",
        "\n <think>a</think>\n\n<answer>B</answer> \n",
        "<think>\na < b > c\n</think> <answer><b>B</b></answer>",
    ],
)
def test_format_accepts(text):
    assert format_reward(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "<answer>B</answer>",
        "<think>a</think>",
        "<think>a</think>B",
        "<think>a</think><answer>B",
        "<think>a<answer>B</answer>",
        "<think></think><answer>B</answer>",
        "<think>a</think><answer></answer>",
        "<think> \n</think><answer>B</answer>",
        "<think>a</think><answer> \t </answer>",
        "Sure. <think>a</think><answer>B</answer>",
        "<think>a</think> so <answer>B</answer>",
        "<think>a</think><answer>B</answer>.",
        "<answer>B</answer><think>a</think>",
        "<think><answer>B</answer></think>",
        "<think>a<answer>b</think>B</answer>",
        "<think></answer></think><answer>B",
        "<think>a</think><answer>B</answer></answer>",
        "<think>a</think><answer>A</answer><answer>B</answer>",
        "<think>a</think><think>b</think><answer>B</answer>",
        "<think><think>a</think></think><answer>B</answer>",
        "<think>a</think><answer>A<answer>B</answer></answer>",
        "<THINK>a</THINK><ANSWER>B</ANSWER>",
        "<think>a</think><answer>B<answer>",
    ],
)
def test_format_rejects(text):
    assert format_reward(text) == -1.0


# ------------------------------------------------------------------------------------------
# choice


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(B)",
        "(b)",
        "[B]",
        "B.",
        "B)",
        "(B).",
        "B:",
        "**B**",
        "'B'",
        "`B`",
        " B ",
        "B?",
        "B) blue",
        "B: blue",
        "B. blue",
        "(B) blue",
        "B blue",
        "B.blue",
        "B - blue",
        "B, blue",
        "B\nblue",
        "**B.** blue",
        "B (blue)",
        "b) Blue.",
        "**B) blue**",
        "[B] blue",
        "blue",
        "Blue",
        "BLUE.",
        '"blue"',
        "  blue\n",
        "option B",
        "Option B.",
        "Option (B)",
        "answer: B",
        "Answer: (B) blue",
        "The answer is B.",
        "The correct answer is: **B**",
        "the correct option is B) blue",
        "B. The sky",
        "B: it is not red",
        "B) because I saw it",
        "(B) A dog in it",
        "B. I'm sure",
        "B. A.M., e.g. at dawn",
        "B, as in B",
        "B. I'd say so",
        "B is correct",
        "B is correct.",
        "Option B is correct",
        "**B** is the correct answer.",
        "(B) is the right option, as it is blue",
        "B is the answer",
    ],
)
def test_choice_reads_b(answer):
    assert normalize_answer(answer, "choice", COLORS) == "B"
    assert accuracy_reward(answer, "B", "choice", COLORS) == 1.0
    assert accuracy_reward(answer, "A", "choice", COLORS) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "?",
        ".",
        "()",
        "purple",
        "E",
        "(E)",
        "E. purple",
        "K",
        "Z",
        "1",
        "2",
        "é",
        "\u0412",
        # two letters
        "A or B",
        "A and B",
        "A/B",
        "A, B",
        "A B",
        "AB",
        "A & B",
        "A\nB",
        "B. or A",
        "B (or C)",
        "A)B)",
        "A) or B)",
        "a) or b)",
        "a, b",
        "a. b.",
        "B, C",
        "(A) (B)",
        "A, B, C, D",
        "ABCD",
        "B. blue or C",
        # the letter of one option, the text of another
        "B. red",
        "B) red",
        "B red",
        "A: blue",
        "red or blue",
        "red, blue",
        "red blue",
        # words, not letters
        "I think A dog",
        "A dog",
        "A dog barks",
        "I",
        "I am",
        "Because",
        "Bad",
        "B-flat",
        "B's",
        "A.M. radio",
        "B or something",
        "either B",
        "not B",
        "B is correct but not blue",
        "B is correct, or C",
        "B is not correct",
        "B is right of it",
        "it is B",
        "none",
        "all of the above",
    ],
)
def test_choice_reads_nothing(answer):
    assert normalize_answer(answer, "choice", COLORS) is None
    assert [accuracy_reward(answer, i, "choice", COLORS) for i in range(4)] == [0.0] * 4


def test_choice_option_forms_agree():
    forms = [
        COLORS,
        tuple(COLORS),
        ["A. red", "B. blue", "C. green", "D. dark red"],
        ["(A) red", "(B) blue", "(C) green", "(D) dark red"],
        ["a) red", "b) blue", "c) green", "d) dark red"],
        dict(zip("ABCD", COLORS)),
        dict(zip("abcd", COLORS)),
        {"A": "A: red", "B": "B: blue", "C": "C: green", "D": "D: dark red"},
    ]
    for options in forms:
        for answer in ["D", "D) dark red", "dark red", "Dark Red."]:
            for truth in ["D", "(D)", "dark red", "D. dark red", 3]:
                assert accuracy_reward(answer, truth, "choice", options) == 1.0
        assert accuracy_reward("red", "D", "choice", options) == 0.0


def test_choice_prefixes_go_only_if_every_option_has_its_own():
    assert normalize_answer("B. blue", "choice", ["A. red", "blue"]) == "B"
    assert normalize_answer("red", "choice", ["A. red", "blue"]) is None
    assert normalize_answer("red", "choice", ["B. red", "A. blue"]) is None


@pytest.mark.parametrize("count", range(2, 11))
def test_choice_with_2_to_10_options(count):
    options = [f"thing {i}" for i in range(count)]
    for i in range(count):
        letter = "ABCDEFGHIJ"[i]
        for answer in [letter, letter.lower(), f"({letter})", f"{letter}. thing {i}", f"thing {i}"]:
            for truth in [i, letter, f"thing {i}"]:
                assert accuracy_reward(answer, truth, "choice", options) == 1.0
            assert accuracy_reward(answer, (i + 1) % count, "choice", options) == 0.0
    if count < 10:
        assert normalize_answer("ABCDEFGHIJ"[count], "choice", options) is None


@pytest.mark.parametrize("answer", ["I think A dog", "A dog", "I am not sure", "I'm", "I’m", "A's"])
def test_choice_article_and_pronoun_are_no_letters_even_with_ten_options(answer):
    assert normalize_answer(answer, "choice", [f"thing {i}" for i in range(10)]) is None
    assert normalize_answer(answer, "choice") is None


def test_choice_article_in_an_option_text():
    options = ["A dog", "A cat", "I am", "dog"]
    assert normalize_answer("A dog", "choice", options) == "A"
    assert normalize_answer("A cat", "choice", options) == "B"
    assert normalize_answer("B. A cat", "choice", options) == "B"
    assert normalize_answer("dog", "choice", options) == "D"
    assert normalize_answer("D. a cat", "choice", options) is None  # D's letter, B's text


def test_choice_without_options_compares_letters():
    assert accuracy_reward("(B) blue", "B", "choice") == 1.0
    assert accuracy_reward("B", 1, "choice") == 1.0
    assert accuracy_reward("J", "J", "choice", []) == 1.0
    assert accuracy_reward("blue", "B", "choice") == 0.0
    assert accuracy_reward("B blue", "B", "choice") == 0.0  # like "A dog": no letter without a sign
    with pytest.raises(ValueError, match="blue"):
        accuracy_reward("B", "blue", "choice")


def test_choice_text_goes_before_letter_and_index_is_certain():
    notes = ["C", "D", "E", "A"]
    assert normalize_answer("C", "choice", notes) == "A"
    assert accuracy_reward("C", "C", "choice", notes) == 1.0
    assert accuracy_reward("C", 0, "choice", notes) == 1.0
    assert accuracy_reward("A. C", 0, "choice", notes) == 1.0
    assert accuracy_reward("C", 2, "choice", notes) == 0.0
    assert accuracy_reward("B", "D", "choice", notes) == 1.0  # "B" is no text here: a letter


def test_choice_numeric_options():
    assert accuracy_reward("-5", "-5", "choice", ["5", "-5"]) == 1.0
    assert accuracy_reward("B. -5", "-5", "choice", ["5", "-5"]) == 1.0
    assert accuracy_reward("5", "-5", "choice", ["5", "-5"]) == 0.0
    assert accuracy_reward("3.5", 1, "choice", [35, 3.5]) == 1.0
    assert accuracy_reward("C#", "C#", "choice", ["C", "C#"]) == 1.0
    assert accuracy_reward("C", "C#", "choice", ["C", "C#"]) == 0.0
    # an int truth is always an index, a str truth never is
    assert accuracy_reward("A", 0, "choice", [1, 0]) == 1.0
    assert accuracy_reward("A", "1", "choice", [1, 0]) == 1.0


def test_choice_empty_option_text_is_never_named():
    assert normalize_answer("?", "choice", ["red", ""]) is None
    assert normalize_answer("B", "choice", ["red", ""]) == "B"


def test_choice_equal_texts_are_ambiguous():
    assert normalize_answer("red", "choice", ["red", "red", "blue"]) is None
    assert normalize_answer("B. red", "choice", ["red", "red", "blue"]) == "B"
    with pytest.raises(ValueError, match="red"):
        accuracy_reward("A", "red", "choice", ["red", "red", "blue"])


# ------------------------------------------------------------------------------------------
# multi


@pytest.mark.parametrize(
    "answer",
    [
        "A,C",
        "A, C",
        "C,A",
        "A and C",
        "AC",
        "CA",
        "A C",
        "a, c",
        "(A) (C)",
        "(A)(C)",
        "[A, C]",
        "A;C",
        "A|C",
        "A/C",
        "A & C",
        "A + C",
        "A\nC",
        "A, and C",
        "A, C, A",
        "AAC",
        "A. C.",
        "A,C,",
        "red, green",
        "Red; Green",
        "red and green",
        "green\nred",
        "A. red, C. green",
        "red, C",
        "A) red and C) green",
        "A. red; C. green",
        "option A, option C",
        "red, red, green, A",
    ],
)
def test_multi_reads_a_and_c(answer):
    assert normalize_answer(answer, "multi", COLORS) == frozenset("AC")
    assert accuracy_reward(answer, "A,C", "multi", COLORS) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        ",",
        ",;|",
        "purple",
        "A, purple",
        "A, E",
        "AE",
        "ac",
        "A. blue, C",
        "I think A",
        "A because",
    ],
)
def test_multi_reads_nothing(answer):
    assert normalize_answer(answer, "multi", COLORS) is None
    assert accuracy_reward(answer, "ABCD", "multi", COLORS) == 0.0


def test_multi_f1_by_hand():
    assert accuracy_reward("A", "A,C", "multi", COLORS) == pytest.approx(2 / 3)
    assert accuracy_reward("A, B", "A,C", "multi", COLORS) == pytest.approx(1 / 2)
    assert accuracy_reward("B, D", "A,C", "multi", COLORS) == 0.0
    # naming everything is no full credit: P = 2/4, R = 1
    assert accuracy_reward("A, B, C, D", "A,C", "multi", COLORS) == pytest.approx(2 / 3)
    assert accuracy_reward("ABCD", "A", "multi", COLORS) == pytest.approx(2 / 5)
    assert accuracy_reward("ABCD", "ABCD", "multi", COLORS) == 1.0


def test_multi_truth_forms_and_option_texts_with_commas():
    for truth in ["A,C", ["A", "C"], [0, 2], ("red", "green"), "red, green"]:
        assert accuracy_reward("C and A", truth, "multi", COLORS) == 1.0
    options = ["red, white", "salt and pepper", "BAD", "blue"]
    assert normalize_answer("red, white", "multi", options) == frozenset("A")
    assert normalize_answer("A. red, white", "multi", options) == frozenset("A")
    assert normalize_answer("red, white; blue", "multi", options) == frozenset("AD")
    assert normalize_answer("salt and pepper, blue", "multi", options) == frozenset("BD")
    assert normalize_answer("BAD", "multi", options) == frozenset("C")  # the text goes first
    assert normalize_answer("DAB", "multi", options) == frozenset("ABD")
    assert normalize_answer("A. x, C. y", "multi") == frozenset("AC")


# ------------------------------------------------------------------------------------------
# yes/no


@pytest.mark.parametrize(
    "answer, form",
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("YES!", "yes"),
        ("y", "yes"),
        ("True", "yes"),
        ("true,", "yes"),
        ("**yes**", "yes"),
        ("(Y)", "yes"),
        ("yes yes", "yes"),
        ("no", "no"),
        ("No.", "no"),
        ("NO", "no"),
        ("n", "no"),
        ("False", "no"),
        ("'false'", "no"),
        ("Yes, there is a dog", "yes"),
        ("No, the dog is silent.", "no"),
        # both words are unreadable, also in good faith
        ("yes and no", None),
        ("no, yes", None),
        ("yes/no", None),
        ("yes or no", None),
        ("true or false", None),
        # what is absent takes nothing back, on neither side
        ("Yes, there is no sound", "yes"),
        ("No, there is no sound", "no"),
        ("**Yes.** No dog barks.", "yes"),
        ("Yes, no doubt", "yes"),
        ("Yes, or no", None),
        ("Yes, no.", None),
        ("Yes. No, it is silent", None),
        ("Yes, no yes", None),
        ("Yes, no and yes", None),
        ("Yes no sound", None),
        ("True, there is no sound", "yes"),
        ("True, false", None),
        ("I say yes", None),
        ("not true", None),
        ("no-one", None),
        ("nope", None),
        ("yesterday", None),
        ("maybe", None),
        ("1", None),
        ("", None),
        (".", None),
    ],
)
def test_yesno(answer, form):
    assert normalize_answer(answer, "yesno") == form
    assert accuracy_reward(answer, "Yes", "yesno") == float(form == "yes")
    assert accuracy_reward(answer, False, "yesno") == float(form == "no")


# ------------------------------------------------------------------------------------------
# number


@pytest.mark.parametrize(
    "answer, value",
    [
        ("5", 5),
        ("5.", 5),
        ("(5)", 5),
        ("**5**", 5),
        (" 5\n", 5),
        ("+5", 5),
        ("005", 5),
        ("~5", 5),
        ("-3", -3),
        ("\u22123", -3),
        ("\u20133", -3),
        ("0", 0),
        ("-0", 0),
        ("-2.5", -2.5),
        ("2.50", 2.5),
        (".5", 0.5),
        ("-.5", -0.5),
        ("5.0", 5),
        ("1e3", 1000),
        ("2.5E-1", 0.25),
        ("1,000", 1000),
        ("1,234,567.5", 1234567.5),
        ("$1,000", 1000),
        ("12345", 12345),
        ("1/2", 0.5),
        ("-3/4", -0.75),
        ("5/10", 0.5),
        ("4/1.", 4),
        # units are dropped, not converted
        ("50%", 50),
        ("50 %", 50),
        ("50 percent", 50),
        ("5km", 5),
        ("5 km²", 5),
        ("5km²", 5),
        ("5 m2", 5),
        ("9.8 m/s^2", 9.8),
        ("9.8 m/s²", 9.8),
        ("an area of 2.5 ft2", 2.5),
        ("-$5", -5),
        ("\u2212€5.50", -5.5),
        ("$-5", -5),
        ("5 km/h", 5),
        ("3D", 3),
        ("There are 5 dogs.", 5),
        ("5 dogs and cats", 5),
        ("5-year-old", 5),
        ("Total: 7", 7),
        ("two", 2),
        ("Two.", 2),
        ("zero", 0),
        ("twenty-one", 21),
        ("twenty one", 21),
        ("ninety", 90),
        ("one hundred", 100),
        ("one hundred and five", 105),
        ("nine hundred ninety-nine", 999),
        ("There are two dogs", 2),
        ("two cats and dogs", 2),
        ("five percent", 5),
        ("no", 0),
        ("None", 0),
        ("none.", 0),
        # as models write them; digits of any script
        (r"\boxed{42}", 42),
        (r"$\boxed{\text{42}}$", 42),
        (r"\frac{1}{2}", 0.5),
        (r"$-3$", -3),
        (r"\(\dfrac{3}{4}\)", 0.75),
        (r"50\%", 50),
        ("\uff15", 5),
        ("\u0663", 3),
        ("5\uff15", 55),
        ("about 5", 5),
        ("5 boxes under the table", 5),
        ("5m", 5),
    ],
)
def test_number_reads(answer, value):
    assert normalize_answer(answer, "number") == value
    assert accuracy_reward(answer, value, "number") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "many",
        "a few",
        "-",
        "+",
        ".",
        ",",
        "/",
        "%",
        "--5",
        "+-5",
        "...5",
        "5e5e5",
        # more than one number
        "5 of 10",
        "3-4",
        "3 - 4",
        "3\u20134",
        "3 to 4",
        "5 or 6",
        "5, 6",
        "5 5",
        "10:30",
        "2x3",
        "two or three",
        "two, three",
        "two three",
        "two-three",
        "5 or six",
        "two (2)",
        "one of 5",
        "one two",
        "one and two",
        "twenty, one",
        "five twenty",
        "twenty-eleven",
        "1 1/2",
        "1/2/3",
        "one hundred two hundred",
        "one hundred hundred",
        "zero five",
        "twenty zero",
        "2\u00b13",
        # digits inside a word, broken numerals
        "H2O",
        "COVID-19",
        "v1.2.3",
        "1.2.3",
        "1,00",
        "1,2",
        "1,0000",
        "1 000",
        "1_000",
        "0x10",
        "x5",
        # words that alter a number
        "5 million",
        "two million",
        "two dozen",
        "two and a half",
        "two thirds",
        "minus five",
        "minus 5",
        "not 5",
        "no 5",
        "no one",
        "no idea",
        "no dogs",
        "None of the above",
        "not two",
        "No, there are two",
        "negative 2",
        "half",
        "a hundred",
        "one thousand",
        "5 thousand",
        # not finite
        "1e999",
        "-1e999",
        "1e99999999999",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "infinity",
        "\u221e",
        "9" * 400,
        "1/" + "9" * 400,
        "1/0",
        "0/0",
        "5/00",
        # powers, fractions and numbers in one character
        "5\u00b2",
        "\u00bd",
        "5\u00bd",
        "\u2464",
        "\u4e09",
        # no number that is known: a bound, a thousand, a sign that may be a list's
        "> 5",
        "<5",
        "\u2265 5",
        "at least 5",
        "at most 5",
        "more than 5",
        "fewer than five",
        "over 5",
        "up to 5",
        "up to five",
        "5 or more",
        "5+",
        "+ -5",
        "\u00b15",
        "- 5",
        "- $5",
        "5 x²",
        "5 CO2",
        "5²",
        "5k",
        "5 k",
        "5M",
        "5B",
        "5K",
    ],
)
def test_number_reads_nothing(answer):
    assert normalize_answer(answer, "number") is None
    for truth in [0, 1, 5, -5, 510, 34, 10, 2]:
        assert accuracy_reward(answer, truth, "number") == 0.0


def test_defect_11_number_parsing_does_not_glue_digits():
    """The released trainer deleted non-digits: "5 of 10" was 510; "3-4" and "two" were nothing."""
    assert normalize_answer("5 of 10", "number") is None
    assert accuracy_reward("5 of 10", 510, "number") == 0.0
    assert normalize_answer("3-4", "number") is None
    assert accuracy_reward("3-4", 34, "number") == 0.0
    assert accuracy_reward("-3", 3, "number") == 0.0
    assert accuracy_reward("2.5", 25, "number") == pytest.approx(0.1)
    assert accuracy_reward("two", 2, "number") == 1.0


def test_defect_12_the_answer_is_not_the_last_capital_letter_anywhere():
    """The released evaluation took the last capital letter of the whole completion."""
    text = "<think>It is C or D.</think><answer>B. blue</answer> Hope this helps, A"
    assert parse_answer(text) == "B. blue"
    assert accuracy_reward(parse_answer(text), "B", "choice", COLORS) == 1.0
    for text in ["I DO NOT KNOW A", "<think>B</think>", "It is B", "<answer>I DO NOT KNOW A"]:
        assert accuracy_reward(parse_answer(text), "A", "choice", COLORS) == 0.0
        assert accuracy_reward(parse_answer(text), "B", "choice", COLORS) == 0.0


def test_number_dense_score_by_hand():
    assert accuracy_reward("4", 5, "number") == pytest.approx(0.8)
    assert accuracy_reward("6", "5", "number") == pytest.approx(0.8)
    assert accuracy_reward("-4", -5, "number") == pytest.approx(0.8)
    assert accuracy_reward("10", 5, "number") == 0.0
    assert accuracy_reward("1000000", 5, "number") == 0.0
    assert accuracy_reward("0", 5, "number") == 0.0
    assert accuracy_reward("0.5", "1/2", "number") == 1.0
    # with truth 0 there is no relative error: equal or nothing
    assert accuracy_reward("0", 0, "number") == 1.0
    assert accuracy_reward("-0.0", 0, "number") == 1.0
    assert accuracy_reward("0.001", 0, "number") == 0.0
    # the extremes of float do not overflow into a reward
    assert accuracy_reward("1e308", -1e308, "number") == 0.0
    assert accuracy_reward("1", 5e-324, "number") == 0.0


def test_number_reads_every_count_to_999():
    """Oracle: the names spelled out by a slow recursive definition."""
    small = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen"
    ).split()
    tens = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()

    def name(n):
        if n < 20:
            return small[n]
        if n < 100:
            return tens[n // 10] + (f"-{small[n % 10]}" if n % 10 else "")
        return f"{small[n // 100]} hundred" + (f" and {name(n % 100)}" if n % 100 else "")

    for n in range(1000):
        assert normalize_answer(name(n), "number") == n
        assert normalize_answer(name(n).replace("-", " ").upper(), "number") == n
        assert normalize_answer(str(n), "number") == n


# ------------------------------------------------------------------------------------------
# text and location


@pytest.mark.parametrize(
    "answer, truth, reward",
    [
        ("violin", "violin", 1),
        ("The  Violin.", "a violin", 1),
        ('"violin"!', "violin", 1),
        ("girl playing the flute", "a girl playing flute", 1),
        ("Straße", "STRASSE", 1),
        ("violins", "violin", 0),
        ("violin and cello", "violin", 0),
        ("", "violin", 0),
        ("...", "violin", 0),
        ("vitamin A", "vitamin", 0),
        ("a", "A", 1),
        ("the", "violin", 0),
        ("3.5", "35", 0),
        ("-5", "5", 0),
        ("1:2", "12", 0),
    ],
)
def test_text(answer, truth, reward):
    assert accuracy_reward(answer, truth, "text") == reward


LEFT_RIGHT = frozenset({("left", "red circle"), ("right", "blue square")})


@pytest.mark.parametrize(
    "answer",
    [
        "left: red circle | right: blue square",
        "right: blue square | left: red circle",
        "Left: Red Circle|Right: Blue Square",
        "left: red circle; right: blue square",
        "left: red circle\nright: blue square",
        "left: red circle, right: blue square",
        "left:red circle |right :blue square |",
        "Left: a red circle. | Right: the blue square.",
        "left: red circle | right: blue square | left: red circle",
        "**Left**: red circle\n\n**Right**: blue square\n",
    ],
)
def test_location_reads(answer):
    assert normalize_answer(answer, "location") == LEFT_RIGHT
    assert accuracy_reward(answer, "left: red circle | right: blue square", "location") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "|",
        "left",
        "left:",
        ": cat",
        "left cat",
        "left: | right: cat",
        "left: cat | dog",
        "left: cat |: dog",
        "cat on the left",
    ],
)
def test_location_reads_nothing(answer):
    assert normalize_answer(answer, "location") is None
    assert accuracy_reward(answer, "left: cat", "location") == 0.0


def test_location_commas_inside_an_object_stay_with_it():
    form = normalize_answer("left: big, red cat | right: dog", "location")
    assert form == {("left", "big red cat"), ("right", "dog")}
    form = normalize_answer("left: cat, small, right: dog", "location")
    assert form == {("left", "cat small"), ("right", "dog")}


@pytest.mark.parametrize(
    "answer, reward",
    [
        ("left: cat | right: dog", 1),
        ("left: cat", 2 / 3),
        ("left: cat | right: cow", 1 / 2),
        ("left: dog | right: cat", 0),
        ("left: cat | right: dog | center: cow", 4 / 5),
        # hedging: both objects of one place count as predicted pairs
        ("left: cat | left: dog | right: dog", 4 / 5),
        ("left: cat | left: dog | left: cow | right: cat | right: dog | right: cow", 4 / 8),
        # the same pair twice is one pair
        ("left: cat | left: cat | right: dog", 1),
    ],
)
def test_location_f1_by_hand(answer, reward):
    truth = "left: cat | right: dog"
    assert accuracy_reward(answer, truth, "location") == pytest.approx(reward)
    assert accuracy_reward(truth, answer, "location") == pytest.approx(reward)  # F1 is symmetric


# ------------------------------------------------------------------------------------------
# truths and arguments


@pytest.mark.parametrize(
    "truth, answer_type, options",
    [
        (None, "number", None),  # str(None) would read as 0
        ("5 of 10", "number", None),
        (float("nan"), "number", None),
        (float("inf"), "number", None),
        (True, "number", None),
        (None, "choice", COLORS),
        (4, "choice", COLORS),
        (-1, "choice", COLORS),
        (-2, "choice", None),
        (10, "choice", None),
        (True, "choice", COLORS),
        (1.0, "choice", COLORS),
        ("E", "choice", COLORS),
        ("purple", "choice", COLORS),
        ("A or B", "choice", COLORS),
        ([], "multi", COLORS),
        (["A", "E"], "multi", COLORS),
        ("A, E", "multi", COLORS),
        ("maybe", "yesno", None),
        ("", "text", None),
        ("left", "location", None),
    ],
)
def test_an_unreadable_truth_is_an_error_never_a_zero(truth, answer_type, options):
    for answer in [None, "A"]:
        with pytest.raises(ValueError, match=answer_type if truth != ["A", "E"] else "choice"):
            accuracy_reward(answer, truth, answer_type, options)


@pytest.mark.parametrize("answer_type", ["mcq", "", None, "Choice", "open"])
def test_unknown_answer_type_is_named(answer_type):
    for call in [
        lambda: accuracy_reward("A", "A", answer_type),
        lambda: accuracy_reward(None, "A", answer_type),
        lambda: normalize_answer(None, answer_type),
        lambda: self_consistency_rewards(["A"], [0.0], answer_type),
    ]:
        with pytest.raises(ValueError, match=re.escape(repr(answer_type))):
            call()


@pytest.mark.parametrize(
    "options", [list("abcdefghijk"), {"1": "red"}, {"A": "x", "a": "y"}, {"AB": "x"}, "A. red"]
)
def test_unusable_options_are_an_error(options):
    with pytest.raises(ValueError, match="options"):
        normalize_answer("A", "choice", options)


@pytest.mark.parametrize("answer_type", TYPES)
def test_no_answer_scores_zero_and_the_truth_scores_one(answer_type):
    truth = TRUTHS[answer_type]
    assert normalize_answer(None, answer_type, COLORS) is None
    assert accuracy_reward(None, truth, answer_type, COLORS) == 0.0
    assert accuracy_reward(str(truth), truth, answer_type, COLORS) == 1.0


# ------------------------------------------------------------------------------------------
# self-consistency


def test_self_consistency_majority_votes_in_normal_form():
    answers, logprobs = ["B", "(B) blue", "blue", "A", None], [-9.0, -9.0, -9.0, -0.1, -0.1]
    assert self_consistency_rewards(answers, logprobs, "choice", COLORS) == [1, 1, 1, 0, 0]
    assert self_consistency_rewards(["two", "2.0", "3"], [-1.0] * 3, "number") == [1, 1, 0]
    answers = ["A,C", "green and red", "A"]
    assert self_consistency_rewards(answers, [-1.0] * 3, "multi", COLORS) == [1, 1, 0]


def test_self_consistency_tie_goes_to_the_higher_mean_not_the_higher_maximum():
    answers = ["A", "A", "B", "B"]
    # mean A = -1.05, mean B = -1.0, though A holds the single likeliest completion
    assert self_consistency_rewards(answers, [-0.1, -2.0, -1.0, -1.0], "choice") == [0, 0, 1, 1]
    assert self_consistency_rewards(answers, [-0.1, -1.0, -1.0, -1.0], "choice") == [1, 1, 0, 0]


def test_self_consistency_likelihood_never_beats_the_count():
    got = self_consistency_rewards(["A", "A", "B"], [-50.0, -50.0, 0.0], "choice")
    assert got == [1.0, 1.0, 0.0]


def test_self_consistency_none_never_wins_and_never_scores():
    nan = float("nan")
    args = [None, None, None, "I do not know", "B"], [0.0, nan, 0.0, 0.0, -9.0], "choice"
    assert self_consistency_rewards(*args) == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert self_consistency_rewards([None, None], [0.0, nan], "choice") == [0.0, 0.0]
    assert self_consistency_rewards([], [], "choice") == []
    assert self_consistency_rewards(["5 of 10"], [0.0], "number") == [0.0]


def test_self_consistency_degenerate_groups():
    assert self_consistency_rewards(["B"], [-1.0], "choice") == [1.0]
    assert self_consistency_rewards(["A", "B", "C"], [-3.0, -1.0, -2.0], "choice") == [0, 1, 0]
    # equal counts and equal means: the first answer, and exactly one class wins
    assert self_consistency_rewards(["B", "A"], [-1.0, -1.0], "choice") == [1.0, 0.0]
    assert self_consistency_rewards(["B"], [-math.inf], "choice") == [1.0]
    with pytest.raises(ValueError, match="2 answers but 1"):
        self_consistency_rewards(["A", "B"], [-1.0], "choice")
    with pytest.raises(ValueError, match="NaN"):
        self_consistency_rewards(["A", "B"], [-1.0, float("nan")], "choice")


def test_self_consistency_does_not_depend_on_the_order_of_the_group():
    answers, logprobs = ["A", "(a)", "B", "b.", None], [-0.1, -0.7, -0.2, -0.5, 0.0]
    expected = dict(zip(answers, [0.0, 0.0, 1.0, 1.0, 0.0]))
    for order in itertools.permutations(range(5)):
        group = [answers[i] for i in order]
        got = self_consistency_rewards(group, [logprobs[i] for i in order], "choice")
        assert got == [expected[answer] for answer in group]


# ------------------------------------------------------------------------------------------
# judge and sum


# ------------------------------------------------------------------------------------------
# open answers


@pytest.mark.parametrize(
    "answer, truth, reward",
    [
        ("No parking", "no parking!", 1),  # case and punctuation at the edges do not count
        ("no stopping", "no parking", 1 / 2),  # one of two words is another
        ("no", "no parking", 1 / 2),  # one is left out
        ("no parking here", "no parking", 1 / 2),  # one is put in
        ("the quick fox", "the quick brown fox", 3 / 4),
        ("parking no", "no parking", 0),
        ("a b c d e", "x", 0),  # 5 edits of 1 word: at least 0
        ("", "x", 0),
    ],
)
def test_ocr_is_one_minus_the_word_error_rate(answer, truth, reward):
    assert accuracy_reward(answer, truth, "ocr") == pytest.approx(reward)


@pytest.mark.parametrize(
    "answer, truth, reward",
    [
        ("A dog runs.", "a dog runs", 1),
        ("dog", "dog", 1),  # no pairs of words: of ROUGE-1 and ROUGE-L
        ("the cat sat", "the cat lay", (2 / 3 + 1 / 2 + 2 / 3) / 3),
        ("sat cat the", "the cat sat", (1 + 0 + 1 / 3) / 3),  # LCS 1 of 3 and 3
        ("the the the", "the cat", (2 / 5 + 0 + 2 / 5) / 3),  # one of three counts
        ("b a b", "a b", (4 / 5 + 2 / 3 + 4 / 5) / 3),
        ("x", "a b", 0),
        (None, "a b", 0),
    ],
)
def test_free_form_is_the_mean_of_three_rouges(answer, truth, reward):
    assert accuracy_reward(answer, truth, "free-form") == pytest.approx(reward)


def slow_common(a, b):
    """Length of the longest common subsequence, by trying both ways."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + slow_common(a[1:], b[1:])
    return max(slow_common(a[1:], b), slow_common(a, b[1:]))


def slow_edits(a, b):
    if not a or not b:
        return len(a) + len(b)
    changed = slow_edits(a[1:], b[1:]) + (a[0] != b[0])
    return min(changed, 1 + slow_edits(a[1:], b), 1 + slow_edits(a, b[1:]))


def test_edits_are_those_of_the_definition():
    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.choices("xyz", k=rng.randint(0, 6)) for _ in range(2))
        assert answers.edit_distance(a, b, 1) == slow_edits(a, b)
        assert answers.edit_distance(a, b, 2) == len(a) + len(b) - 2 * slow_common(a, b)


def test_open_answers_vote_by_all_their_words():
    answers = ["A dog runs.", "a dog runs", "a dog ran", None]
    for kind in ("ocr", "free-form"):
        assert self_consistency_rewards(answers, [-9, -9, -0.1, 0], kind) == [1, 1, 0, 0]
        # all different: the likeliest
        assert self_consistency_rewards(answers[1:3], [-9, -0.1], kind) == [0, 1]


# ------------------------------------------------------------------------------------------
# as models write them


@pytest.mark.parametrize(
    "answer",
    [
        r"\boxed{B}",
        "$B$",
        r"\text{B}",
        r"\boxed{\text{B}}",
        r"$\boxed{B. blue}$",
        r"\(B\)",
        "Ｂ",
        "（Ｂ）",
        "选项B",
        "选B",
        "答案：B",
        "答案是B",
        "B、blue",
        "B。",
    ],
)
def test_a_choice_as_models_write_it(answer):
    assert normalize_answer(answer, "choice", COLORS) == "B"


@pytest.mark.parametrize("answer", [r"\boxed{A} or \boxed{B}", "B and C", "B、C", "选项B或C"])
def test_two_choices_are_none(answer):
    assert normalize_answer(answer, "choice", COLORS) is None


def test_other_types_as_models_write_them():
    assert normalize_answer("A、C", "multi", COLORS) == {"A", "C"}
    assert normalize_answer("Ａ，Ｃ", "multi", COLORS) == {"A", "C"}
    said = {"是": "yes", "否。": "no", "不是": None, "not yes": None, r"\text{Yes}": "yes"}
    assert {text: normalize_answer(text, "yesno") for text in said} == said
    options = [r"$\frac{1}{2}$", "2"]
    assert normalize_answer(r"\frac{1}{2}", "choice", options) == "A"


def test_accents_in_one_character_or_two_are_the_same():
    for word in ("naïve", "Điện thoại", "한국어", "ガラス"):
        composed, decomposed = (unicodedata.normalize(form, word) for form in ("NFC", "NFD"))
        assert composed != decomposed
        for answer_type in ("text", "ocr", "free-form", "location"):
            place = "left: " if answer_type == "location" else ""
            answer, truth = place + decomposed, place + composed
            assert accuracy_reward(answer, truth, answer_type) == 1.0
            assert accuracy_reward(truth, answer, answer_type) == 1.0
        assert normalize_answer(decomposed, "choice", [composed, "other"]) == "A"


# ------------------------------------------------------------------------------------------
# hostile text

MEGA = 1_000_000


@pytest.mark.parametrize(
    "unit",
    ["<answer>", "</answer>", "<think>", "<think><answer>", "<answer>A</answer>", "<", " ", "."],
)
def test_a_megabyte_of_tags_completes(unit):
    text = unit * (MEGA // len(unit))
    think, answer = rewards.split_completion(text)
    assert think is None and answer in (None, "A")
    assert format_reward(text) == -1.0
    assert rewards.split_completion(f"<think>{text}</think><answer>B</answer>")[1] == "B"


@pytest.mark.parametrize(
    "answer_type, unit",
    [
        ("choice", "the "),
        ("choice", "A "),
        ("multi", ","),
        ("multi", "A and "),
        ("yesno", "yes "),
        ("number", "1,000"),
        ("number", "9"),
        ("number", "one "),
        ("text", "a "),
        ("location", ","),
        ("location", "left:"),
        ("number", r"\("),
        ("choice", r"\text{"),
        ("choice", r"\frac{1}"),
        ("number", "$"),
        ("number", "than "),
        ("text", "e\u0301\u0315"),
        ("text", "\u0315\u0301"),
        ("yesno", "yes, no "),
        ("number", "5 m"),
    ],
)
def test_a_megabyte_of_answer_completes(answer_type, unit):
    answer = unit * (MEGA // len(unit))
    assert 0.0 <= accuracy_reward(answer, TRUTHS[answer_type], answer_type, COLORS) < 1.0 or (
        answer_type == "yesno"
    )


def oracle_answer(text):
    """The definition, by a regular expression that is fine on short text only."""
    tail = text.rsplit("</think>", 1)[-1]
    pairs = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", tail, flags=re.DOTALL)
    return (pairs[-1].strip() or None) if pairs and "<think>" not in tail else None


def oracle_format(text):
    inner = r"((?:(?!</?(?:think|answer)>).)*)"
    whole = rf"\s*<think>{inner}</think>\s*<answer>{inner}</answer>\s*"
    match = re.fullmatch(whole, text, flags=re.DOTALL)
    return 1.0 if match and match[1].strip() and match[2].strip() else -1.0


def test_fuzz_tag_soup_matches_the_definition():
    rng = random.Random(0)
    good = ["<think>", "A", "</think>", "\n", "<answer>", "A", "</answer>"]
    num_good = num_answers = 0
    for i in range(20_000):
        tokens = list(good) if i % 2 else rng.choices(good + ["<", " "], k=rng.randint(0, 12))
        for _ in range(rng.randint(0, 3)):
            at = rng.randint(0, len(tokens))
            tokens[at : at + rng.randint(0, 1)] = rng.choices(
                good + [" ", "x"], k=rng.randint(0, 2)
            )
        text = "".join(tokens)
        think, answer = rewards.split_completion(text)
        assert answer == parse_answer(text) == oracle_answer(text)
        assert format_reward(text) == oracle_format(text)
        assert (think and answer) or format_reward(text) == -1.0
        assert accuracy_reward(answer, "A", "choice") in (0.0, 1.0)
        num_good += format_reward(text) == 1.0
        num_answers += answer is not None
    assert 1_000 < num_good < num_answers < 19_000  # the soup holds both kinds


@pytest.mark.parametrize("answer_type", TYPES)
def test_fuzz_answers_never_raise_and_rewards_stay_in_range(answer_type):
    rng = random.Random(1)
    tokens = list("ABCDEJabiI0159.,:;|()[]{}*'\"`-+/%$_&\\ \n\t\u0660\uff15\u2212\u00bd\u0130\0")
    tokens += (
        "red blue green yes no true left: right: cat two twenty none 1e9 nan 1,000 <b>".split()
    )
    tokens += [" and ", " or ", " hundred ", "the ", "A. ", "option "]
    num_read = 0
    for _ in range(3_000):
        answer = "".join(rng.choices(tokens, k=rng.randint(0, 8)))
        options = rng.choice([COLORS, None])
        form = normalize_answer(answer, answer_type, options)
        reward = accuracy_reward(answer, TRUTHS[answer_type], answer_type, options)
        assert 0.0 <= reward <= 1.0 and (form is not None or reward == 0.0)
        votes = self_consistency_rewards([answer, None, answer], [-1, 0, -2], answer_type, options)
        assert votes == [float(form is not None), 0.0, float(form is not None)]
        num_read += form is not None
    assert 20 < num_read < 3_000


# ---- a whole group


toy_judge = judge.Judge("toy", toy.judge, errors=(), num_threads=1).reward


def test_reward_completions_by_hand():
    row = dict(
        prompt_id="q",
        answer="B",
        answer_type="choice",
        options=["red", "blue"],
        events=["left red circle; high tone"],
    )
    good = "<think>1: left red circle; high tone</think><answer>B</answer>"
    bad = "<think>1: left blue circle; high tone</think><answer>A</answer>"
    broken = "no tags"
    scored = rewards.reward_completions(
        row, [good, good, bad, broken], [-1.0] * 4, {"format": 0.2, "acc": 0.4, "self": 0.4}, None
    )
    assert [r for r, _ in scored] == pytest.approx([1.0, 1.0, 0.2, -0.2])
    judged = rewards.reward_completions(
        row, [good, bad, broken], [-1.0] * 3, {"format": 0.5, "judge": 0.5}, toy_judge
    )
    assert [r for r, _ in judged] == pytest.approx([1.0, 0.5, -0.5])
    unjudged = rewards.reward_completions(
        row, [good], [-1.0], {"format": 0.5, "judge": 0.5}, lambda row, think: None
    )
    assert unjudged[0][0] is None  # not judged is not zero


def test_a_completion_that_is_cut_off_is_scored_by_what_it_says():
    """By --max-new-tokens: an answer before the cut counts for accuracy, never for the format."""
    row = dict(prompt_id="q", answer="B", answer_type="choice", options=["red", "blue"])
    whole = "<think>I look</think><answer>B</answer>"
    cut = [whole, whole + " and then", "<think>I look</think><answer>B", "<think>I look at the"]
    weights = {"format": 0.5, "acc": 0.5}
    scored = rewards.reward_completions(row, cut, [-1.0] * 4, weights, None)
    assert [(parts["format"], parts["acc"]) for _, parts in scored] == [
        (1, 1),
        (-1, 1),
        (-1, 0),
        (-1, 0),
    ]


def test_defect_10_braces_in_a_reasoning_do_not_break_the_judge():
    row = dict(
        answer="B", answer_type="choice", options=["red", "blue"], events=["x"], prompt_id="q"
    )
    text = "<think>1: {steps} {0} %s {{</think><answer>B</answer>"
    ((reward, parts),) = rewards.reward_completions(row, [text], [-1.0], {"judge": 1.0}, toy_judge)
    assert reward == parts["judge"] == 0
