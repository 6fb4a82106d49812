"""Groups of rows with a common beginning: valid whatever the prompts, and the cheapest there are."""

from hypothesis import given
from hypothesis import strategies as st

from foretune.models.beginnings import group_by_beginning
from foretune.models.encoding import EncodedPair

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


def pairs_of(prompts):
    return [EncodedPair(i, "b", "train", 1.0, prompt, [7], [8], False) for i, prompt in enumerate(prompts)]


def cost(prompts, groups, overhead):
    return sum(
        length + overhead + sum(len(prompts[member]) - length for member in members) for length, members in groups
    )


def least_cost(prompts, overhead):
    """By trying, at every node of the tree of prefixes, to stay together or to part."""
    common = 0
    while all(len(prompt) > common for prompt in prompts) and len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    shared = min(common, min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    together = shared + overhead + sum(len(prompt) - shared for prompt in prompts)
    children = {}
    for prompt in prompts:
        children.setdefault(tuple(prompt[common : common + 1]), []).append(prompt)
    if len(children) == 1:
        return together
    return min(together, sum(least_cost(members, overhead) for members in children.values()))


@given(PROMPTS, st.integers(0, 8))
def test_groups_are_valid_and_the_cheapest(prompts, overhead):
    groups = group_by_beginning(pairs_of(prompts), overhead=overhead)
    assert sorted(member for _, members in groups for member in members) == list(range(len(prompts)))
    for length, members in groups:
        assert len({tuple(prompts[member][:length]) for member in members}) == 1
        assert all(length < len(prompts[member]) for member in members)
    assert cost(prompts, groups, overhead) == least_cost(prompts, overhead)


def test_no_rows_are_no_groups():
    assert group_by_beginning([], overhead=1) == []
