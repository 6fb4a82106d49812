"""The words of the report, each explained once, for a reader who has not read the paper."""

WORDS = {
    "distinguishability": (
        "How far apart the model holds the two sides of a preference before any training: the distance between the "
        "average internal state on prompts where one answer is preferred and on prompts where the other is. "
        "The larger it is, the faster the behaviour is learned. Few pairs make it look larger than it is; the value "
        "given here has that part taken off (de-biased)."
    ),
    "generalised distinguishability": (
        "The same idea for answers of any length: the size of the average push that a behaviour's pairs give to the "
        "trained parameters. The larger it is, the faster the behaviour is learned on its own."
    ),
    "interval": "Where the true value probably lies (95%), found by drawing the pairs again and again.",
    "permutation floor": (
        "What distinguishability comes to when the preferences are shuffled, so that there is nothing to learn. "
        "A behaviour that is not above this floor, before the part of noise is taken off, may be chance."
    ),
    "separability": (
        "The distance between the two sides in units of the spread within each (Cohen's d): 0.2 is small, 0.8 large. "
        "The larger it is, the higher the accuracy can rise."
    ),
    "priority": (
        "How far a behaviour points the way that the whole mixture points. High priority: the others help it. "
        "Negative: the mixture pushes against it."
    ),
    "initial speed": (
        "How fast a behaviour's loss falls in the first moment of training on the whole mixture, as a share of the "
        "fastest behaviour's. Negative: the loss rises, the behaviour is un-learned at first."
    ),
    "loss": "What training makes smaller. For DPO it starts at 0.693; above its start means un-learned.",
    "reward accuracy": (
        "The share of pairs in which training has moved the model towards the chosen answer, compared with where it "
        "started. It says nothing about which answer the model would give. "
        "Of a reward model: the share of pairs in which the chosen answer is rewarded more."
    ),
    "output accuracy": (
        "The share of pairs in which the model now finds the chosen answer likelier than the rejected one: what it "
        "would really say."
    ),
    "margin": (
        "How much more training has raised the log-probability of the chosen answer than that of the rejected one. "
        "Positive: it moved the right way. "
        "Of a reward model: how much higher the chosen answer is rewarded."
    ),
    "behaviour kernel": (
        "For each two behaviours, how much a training step on one helps (positive) or hurts (negative) the other."
    ),
    "displacement": (
        "How much the log-probability of an answer has changed since the start. If even the chosen answers fall, the "
        "probability goes to some third answer that nobody asked for."
    ),
    "alignment": (
        "How a pair pushes on its own behaviour, in units of the average pair. Negative: it pushes the other way, as "
        "a mislabelled pair does."
    ),
    "rank": "The place of the final loss among all behaviours; 1 is the lowest loss, the best learned.",
    "confidence": (
        "How far a forecast may be trusted that follows the model in first order from where its features were taken. "
        "It stands on the error found where features were taken anew, or else on how far the behaviour moves. In our "
        "study of real runs (docs/fidelity.md; DPO, LoRA and all weights, persona statements) half of the final losses "
        "were within 0.03 of a forecast of high confidence, 0.04 of medium and 0.08 of low; nine in ten within 0.09, "
        "0.12 and 0.17. Most of the errors were on one side: more was learned than was forecast."
    ),
    "likely loss": (
        "Beneath a forecast loss: where the observed one should lie, in proportion to how much the losses are forecast "
        "to change. As far from the forecast as the losses of one set of behaviours were in our study of real runs "
        "(docs/fidelity.md); of other behaviours it held eight in ten."
    ),
    "rank correlation": (
        "Spearman's: 1 when the forecast puts the behaviours in exactly the order that came, "
        "0 when it is no better than chance."
    ),
}

VERDICTS = {
    "learned first": "The loss falls by at least half of the largest fall, in the earliest quarter of behaviours.",
    "learned": "The loss falls by at least half of the largest fall of any behaviour.",
    "slow": "The loss falls by less than half of the largest fall.",
    "crowded out": "Slow, and the other behaviours, taken together, push against it.",
    "un-learned at first": "The loss rises before it falls.",
    "un-learned": "The loss ends above its start.",
    "indistinguishable (below the permutation floor)": "No clearer than shuffled preferences would be by chance.",
    "one class only": "All pairs (or all but one) prefer the same answer.",
    "too few pairs": "Fewer than 10 pairs.",
    "not judged yet": "Nothing has been measured for it yet.",
}
