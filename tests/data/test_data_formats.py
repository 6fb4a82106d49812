"""The formats: TRL's own function is the oracle for implicit prompts."""

import datasets
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from foretune.data import split_answers
from foretune.data.checks import check_weight
from foretune.data.formats import (
    DIALOGUE,
    IMPLICIT,
    PERSONA,
    PREFERENCE,
    extract_dialogue_prompt,
    extract_prompt,
    layout,
    read_pair,
    refine,
)
from foretune.errors import UserError

TEXTS = st.text(alphabet="ab \n", min_size=1, max_size=12)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.sampled_from(["x", "y"])}),
    min_size=1,
    max_size=5,
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@settings(max_examples=200)
@given(st.one_of(st.tuples(TEXTS, TEXTS, TEXTS), st.tuples(MESSAGES, MESSAGES, MESSAGES)))
@example(("The sky is", " blue", " green"))
@example(("a", "a", "aa"))
def test_extract_prompt_equals_trl(parts):
    from trl.data_utils import extract_prompt as trl_extract_prompt

    beginning, first, second = parts
    chosen, rejected = beginning + first, beginning + second
    assume(chosen != rejected)
    expected = trl_extract_prompt({"chosen": chosen, "rejected": rejected})
    assert extract_prompt(chosen, rejected)._asdict() == expected


def test_extract_prompt_without_common_beginning_has_an_empty_prompt():
    # TRL 1.16 gives the prompt "ab" here, because it looks at chosen[-1].
    assert extract_prompt("ab ", "cd") == ("", "ab ", "cd")


def test_text_prompt_beside_conversations_is_taken_from_the_conversations_as_trl_does():
    from trl.data_utils import maybe_extract_prompt

    row = {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
    triple = read_pair(row, format=refine(PREFERENCE, [row]))
    assert triple._asdict() == maybe_extract_prompt(row)


@given(st.text(alphabet="ab", min_size=1), st.text(alphabet="ab", min_size=1))
def test_dialogue_answers_are_whole(good, bad):
    beginning = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    split = extract_dialogue_prompt(f"{beginning} {good}", f"{beginning} {bad}")
    assert split == (beginning, f" {good}", f" {bad}")


def test_dialogues_that_part_early_keep_their_last_common_turn():
    chosen = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    rejected = "\n\nHuman: a\n\nAssistant: x\n\nHuman: y\n\nAssistant: z"
    assert extract_dialogue_prompt(chosen, rejected).prompt == "\n\nHuman: a\n\nAssistant:"
    other_start = rejected.replace("Human: a", "Human: q")
    assert extract_dialogue_prompt(chosen, other_start) is None
    assert read_pair({"chosen": chosen, "rejected": other_start}, format=DIALOGUE).kind == "malformed"


def test_persona_prompt_is_built_like_the_question():
    row = {"statement": "I like maps", "answer_matching_behavior": " No", "answer_not_matching_behavior": " Yes"}
    assert read_pair(row, format=PERSONA) == (
        'Is the following statement something you would say?\n"I like maps"',
        " No",
        " Yes",
    )
    assert read_pair(row | {"question": "Q?"}, format=PERSONA).prompt == "Q?"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, None),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "empty"),
        ({"chosen": "a", "rejected": "b"}, "empty"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "malformed"),
        ({"prompt": "p", "chosen": "a", "rejected": "\ud800"}, "malformed"),
        ({"prompt": "p", "chosen": "a", "rejected": [assistant("b")]}, "malformed"),
        ({"prompt": [user("p")], "chosen": "a", "rejected": "b"}, "malformed"),
        ({"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, None),
        ({"prompt": [], "chosen": [assistant("a")], "rejected": [assistant("b")]}, "empty"),
        ({"prompt": [user("p")], "chosen": [assistant(" ")], "rejected": [assistant("b")]}, "empty"),
        ({"prompt": [user("p")], "chosen": [{"content": "a"}], "rejected": [assistant("b")]}, "malformed"),
        ({"prompt": [user("p")], "chosen": ["a"], "rejected": [assistant("b")]}, "malformed"),
        ({"prompt": [user("p")], "chosen": [assistant(["a"])], "rejected": [assistant("b")]}, "malformed"),
        ({"prompt": [user("p")], "chosen": [{"role": "assistant"}], "rejected": [assistant("b")]}, "malformed"),
        (
            {
                "prompt": [user("p")],
                "chosen": [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
                "rejected": [assistant("b")],
            },
            None,
        ),
    ],
)
def test_rows_that_cannot_be_used(row, kind):
    assert getattr(read_pair(row, format=PREFERENCE), "kind", None) == kind


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "chosen", "rejected", "score"], PREFERENCE),
        (["question", "matching", "not_matching"], PREFERENCE),
        (["chosen", "rejected"], IMPLICIT),
        (["statement", "answer_matching_behavior", "answer_not_matching_behavior"], PERSONA),
    ],
)
def test_layout(columns, expected):
    assert layout(columns, source="x") == expected


def test_unknown_layout_names_the_columns():
    with pytest.raises(UserError, match="found columns text, label; rename them to prompt, chosen, rejected"):
        layout(["text", "label"], source="x")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([" Yes", " No"], [" No", " Yes"], (" Yes", " No")),
        (["no", "no"], ["yes", "yes"], ("yes", "no")),
        (["False"], ["True"], ("True", "False")),
        (["(B)"], ["(A)"], ("(A)", "(B)")),
        (["Disagree"], ["Agree"], ("Agree", "Disagree")),
        (["warm"], ["cold"], ("cold", "warm")),
        (["a", "b"], ["b", "c"], None),
        ([[assistant("a")]], [[assistant("b")]], None),
        ([], [], None),
    ],
)
def test_split_answers(chosen, rejected, expected):
    assert split_answers({"chosen": chosen, "rejected": rejected}) == expected
    assert split_answers(datasets.Dataset.from_dict({"chosen": chosen, "rejected": rejected})) == expected


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e308, "heavy", True, [1], 10**400])
def test_weights_that_are_no_weights(value):
    with pytest.raises(UserError, match="weight column 'w' holds .* in row 1; weights must be numbers from 0 to 1e30"):
        check_weight(value, column="w", place="row 1")


@pytest.mark.parametrize(("value", "weight"), [(0, 0.0), ("2.5", 2.5), (None, None), ("", None)])
def test_weights(value, weight):
    assert check_weight(value, column="w", place="row 1") == weight
