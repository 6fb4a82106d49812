"""Held-out prompts and limits pair by pair, with sets and dictionaries."""

from foretune.data.formats import two_answers
from foretune.data.splits import canonical, stable_hash


def reference_held_out(pairs, test_fraction):
    """The prompt keys that are held out, as a set."""
    prompts = {}
    for pair in sorted(pairs, key=lambda pair: canonical(pair.answers) if pair.answers else ""):
        prompts.setdefault(pair.behaviour, {}).setdefault(pair.prompt_key, pair)
    train = {next(iter(examples)) for examples in prompts.values() if len(examples) == 1}
    test = set()
    for behaviour in sorted(prompts):
        examples = prompts[behaviour]
        wanted = min(round(test_fraction * len(examples)), len(examples) - 1)
        ranked = _balanced([examples[key] for key in sorted(examples.keys() - train - test)])
        test.update(pair.prompt_key for pair in ranked[: max(0, wanted - len(examples.keys() & test))])
        train.update(examples.keys() - test)
    return test


def reference_limit(pairs, limit, seed):
    """The ids of the pairs that are kept, as a set."""
    by_behaviour = {}
    for pair in pairs:
        by_behaviour.setdefault(pair.behaviour, []).append(pair)
    kept = set()
    for group in by_behaviour.values():
        ranked = sorted(group, key=lambda pair: (stable_hash(seed, pair.pair_id), pair.pair_id))
        kept.update(pair.pair_id for pair in _balanced(ranked)[:limit])
    return kept


def _balanced(ranked):
    answers = two_answers(pair.answers or (None, None) for pair in ranked)
    if answers is None:
        return ranked
    by_answer = [[pair for pair in ranked if pair.answers[0] == answer] for answer in answers]
    shared = min(map(len, by_answer))
    alternating = [pair for couple in zip(*by_answer, strict=False) for pair in couple]
    return alternating + by_answer[0][shared:] + by_answer[1][shared:]
