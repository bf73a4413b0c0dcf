"""
Questions as other projects write them.

    python -m pytest tests/test_questions.py
"""

import pytest

from data.questions import PlaceholderError, cut_options, name_placeholders, split_question

CLOSING = [  # sentences that other projects put after the options
    "Please provide your answer by stating the letter followed by the full option.",
    "Please respond with only the letter of the correct answer.",
    "Answer with the option's letter from the given choices directly.",
    "\nAnswer with the option's letter from the given choices directly.",
    "Answer:",
    "The best answer is:",
    "Select the best answer to the above multiple-choice question based on the video.",
    "\nPlease answer with the letter only.",
    "Please provide only the single option letter (e.g., A, B, C, D, etc.) within the "
    "<answer> </answer> tags.",
]


@pytest.mark.parametrize("closing", CLOSING)
def test_a_closing_sentence_is_no_part_of_the_last_option(closing):
    split = split_question(f"Which?\nA. red\nB. blue\nC. green\n{closing}")
    assert split.text == "Which?" and split.options == ["A. red", "B. blue", "C. green"]
    assert split.removed == [closing.strip()]


@pytest.mark.parametrize(
    "text",
    [
        "Which?\nA. red\nB. blue",
        "Which?\n  A. red\n\n  B. blue",
        "Which? A. red B. blue",
        "Which? A. red, B. blue",
        "Which?\na. red\nb. blue",
        "Which?\nOptions:\nA. red\nB. blue",
        "Which?\nChoices: A. red\nB. blue",
        "Which?\nOption A. red\nOption B. blue",
        "Which?\n1. red\n2. blue",
        "Which? A. red B. blue\nAnswer with a letter.",
    ],
)
def test_forms_of_options(text):
    split = split_question(text)
    assert (split.text, split.options) == ("Which?", ["A. red", "B. blue"])
    assert split.is_numbered == ("1." in text)


def test_options_with_brackets_and_of_several_lines():
    assert split_question("Which?\n(A) red\n(B) blue").options == ["(A) red", "(B) blue"]
    split = split_question("Which?\nA. red\n  or so\nB. blue\n  or so\nAnswer:")
    assert split.options == ["A. red\n  or so", "B. blue\n  or so"]
    split = split_question("Which?\nA. red\nB. blue\n  or so")
    assert split.options == ["A. red", "B. blue\n  or so"]


def test_no_text_is_lost():
    split = split_question("Which?\nA. red\nB. blue\nConsider the left half.")
    assert split.text == "Which?\nConsider the left half." and split.options[1] == "B. blue"


@pytest.mark.parametrize(
    "text",
    [
        "Who is it (A) or (B)?",
        "Who?\n(B) she\n(A) he",  # not in the order of their letters
        "A. red\nB. blue",  # no question
        "Is vitamin A. good for you, or B. 12?",
        "Read this.\nChoose the option that fits what the dog does.",
    ],
)
def test_what_is_no_option_stays(text):
    assert cut_options(text) == (text, [])
    assert split_question(text).removed == []


@pytest.mark.parametrize(
    "text, question",
    [
        ("Is it red?\nPlease answer yes or no.", "Is it red?"),
        (
            "What is felt? Output the thinking process in <think> </think> and the final emotion in "
            "<answer> </answer> tags.",
            "What is felt?",
        ),
        ("Why?\nAnswer the question using a single word or phrase.", "Why?"),
    ],
)
def test_answer_instructions_are_taken_out(text, question):
    split = split_question(text)
    assert split.text == question and len(split.removed) == 1


@pytest.mark.parametrize(
    "text, images, videos, sounds, expected",
    [
        ("<image>\nWhich?", 1, 0, 0, "Which?"),
        ("Which?<image>", 1, 0, 0, "Which?"),
        ("<image>\nWhich?", 0, 1, 0, "Which?"),  # LLaVA writes <image> for a video
        ("<video><audio>Which?", 0, 1, 0, "Which?"),  # the video's own sound
        ("<video><audio>Which?", 0, 1, 1, "Which?"),
        ("Which?", 2, 1, 0, "Which?"),
        ("Is <image> like <image>?", 2, 0, 0, "Is picture 1 like picture 2?"),
        ("<image>Is it like <image>?", 2, 0, 0, "Is it like picture 2?"),
        ("What is in <image>, then?", 1, 0, 0, "What is in the picture, then?"),
        ("1:<image>\n2:<image>\nWhich?", 2, 0, 0, "1: picture 1\n2: picture 2\nWhich?"),
        ("<image>What does the <image> tag do?", 1, 0, 0, "What does the <image> tag do?"),
        ("<image>Which?", 2, 0, 0, None),
        ("<image><image>Which?", 1, 0, 0, None),
        ("<image>Which?", 0, 0, 1, None),
    ],
)
def test_media_placeholders(text, images, videos, sounds, expected):
    num_media = dict(image=images, video=videos, audio=sounds)
    if expected is None:
        with pytest.raises(PlaceholderError):
            name_placeholders([text], num_media)
    else:
        assert name_placeholders([text], num_media) == [expected]
