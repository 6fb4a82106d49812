"""Splits, limits and ids do not depend on row order, on the process or on the file."""

import os
import random
import subprocess
import sys
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference.splits import reference_held_out, reference_limit

from foretune.data.formats import Triple
from foretune.data.pairs import Pairs
from foretune.data.splits import DISTINCT_ANSWERS, PairMaker, held_out_prompts, limit_pairs, stable_hash

# two answers, a third, and a side that is not there
SIDES = [("x", "y"), ("y", "x"), ("x", "z"), ("x", "")]
ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12), st.sampled_from(SIDES)), min_size=1, max_size=60)
FRACTIONS = st.floats(0, 0.99)


def make_pairs(rows, seed=0):
    maker = PairMaker(seed)
    return Pairs.of(maker.pair(behaviour, Triple(f"p{prompt}", *sides), 1.0) for behaviour, prompt, sides in rows)


def shuffled(items, seed):
    return random.Random(seed).sample(items, len(items))


@given(ROWS, FRACTIONS, st.integers(0, 3))
def test_held_out_share_of_each_behaviour(rows, fraction, seed):
    pairs = make_pairs(rows, seed)
    test = {*held_out_prompts(pairs, test_fraction=fraction).tolist()}
    assert test == reference_held_out(pairs, fraction)
    first = min(pair.behaviour for pair in pairs)
    prompts = {pair.prompt_key for pair in pairs if pair.behaviour == first}
    singles = {
        next(iter(keys))
        for behaviour in "abc"
        if len(keys := {pair.prompt_key for pair in pairs if pair.behaviour == behaviour}) == 1
    }
    assert not test & singles
    # The first behaviour is bound by nothing but the single prompts of others.
    held_out = min(round(fraction * len(prompts)), len(prompts) - 1, len(prompts - singles))
    assert len(test & prompts) >= held_out
    assert prompts - test


@given(ROWS, FRACTIONS, st.integers(0, 5))
def test_held_out_prompts_do_not_depend_on_row_order(rows, fraction, order):
    expected = held_out_prompts(make_pairs(rows), test_fraction=fraction)
    assert held_out_prompts(make_pairs(shuffled(rows, order)), test_fraction=fraction).tolist() == expected.tolist()


def test_without_shared_prompts_every_behaviour_holds_out_its_share():
    rows = [(behaviour, f"{behaviour}{number}", ("x", "y")) for behaviour in "abc" for number in range(20)]
    pairs = make_pairs(rows)
    test = {*held_out_prompts(pairs, test_fraction=0.2).tolist()}
    assert Counter(pair.behaviour for pair in pairs if pair.prompt_key in test) == dict.fromkeys("abc", 4)
    assert {*held_out_prompts(make_pairs(rows, seed=1), test_fraction=0.2).tolist()} != test


@given(ROWS, st.integers(0, 5))
def test_pair_ids_are_unique_and_do_not_depend_on_row_order(rows, order):
    pairs, others = make_pairs(rows), make_pairs(shuffled(rows, order))
    ids = {pair.pair_id for pair in pairs}
    assert len(ids) == len(pairs)
    assert ids == {pair.pair_id for pair in others}
    assert all(0 <= pair_id < 2**63 for pair_id in ids)


def test_key_order_in_messages_does_not_change_the_id():
    first = PairMaker(0).pair("b", Triple([{"role": "user", "content": "q"}], [], []), 1.0)
    second = PairMaker(0).pair("b", Triple([{"content": "q", "role": "user"}], [], []), 1.0)
    assert first == second


@given(ROWS, st.integers(1, 10), st.integers(0, 5))
def test_limit_keeps_the_same_rows_in_any_order(rows, limit, order):
    pairs, others = make_pairs(rows), make_pairs(shuffled(rows, order))
    kept = pairs[limit_pairs(pairs, limit=limit, seed=0)]
    assert {*kept.pair_id.tolist()} == reference_limit(pairs, limit, 0)
    assert max(len(rows) for _, rows in kept.groups()) <= limit
    other = others[limit_pairs(others, limit=limit, seed=0)]
    assert {*kept.pair_id.tolist()} == {*other.pair_id.tolist()}


@settings(max_examples=30)
@given(st.integers(0, 30), st.integers(1, 30), st.integers(2, 40))
def test_limit_balances_two_answers(num_yes, num_no, limit):
    maker = PairMaker(0)
    yes = [maker.pair("b", Triple(f"y{number}", "Yes", "No"), 1.0) for number in range(num_yes)]
    no = [maker.pair("b", Triple(f"n{number}", "No", "Yes"), 1.0) for number in range(num_no)]
    pairs = Pairs.of(yes + no)
    kept = pairs[limit_pairs(pairs, limit=limit, seed=0)]
    assert len(kept) == min(limit, num_yes + num_no)
    answers = Counter(pair.answers[0] for pair in kept)
    assert min(answers["Yes"], answers["No"]) >= min(num_yes, num_no, limit // 2)


def test_hashes_are_the_same_in_another_process():
    code = "from foretune.data.splits import stable_hash; print(stable_hash(0, 'p', 'é'))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(told.stdout) == stable_hash(0, "p", "é")


def test_hashes_stay_what_they_are():
    # Runs are compared by these ids, across releases as well.
    assert PairMaker(0).pair("b", Triple("p", "c", "r"), 1.0).pair_id == 8085235846906592282


def test_answers_are_forgotten_once_a_behaviour_has_too_many():
    maker = PairMaker(0)
    made = [maker.pair("free", Triple(f"p{number}", f"{number}", "n"), 1.0) for number in range(DISTINCT_ANSWERS)]
    made.append(maker.pair("two", Triple("p", "Yes", "No"), 0.5))
    assert not maker.free_text()
    made.append(maker.pair("free", Triple("p", "one more", "n"), 1.0))
    pairs = Pairs.of(made)
    assert [*pairs] == made and made[0].answers == ("0", "n") and made[-1].answers is None
    assert {pair.answers for pair in pairs.without_answers(maker.free_text())} == {None, ("Yes", "No")}
