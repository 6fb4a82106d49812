"""TRL's losses by their names: what each is a function of, and of which scores."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from trl import DPOConfig

from foretune.errors import UserError
from foretune.objectives import (
    DPO,
    EXO,
    IPO,
    ORPO,
    DiscoPOP,
    Objective,
    Pairwise,
    PlackettLuce,
    RankingObjective,
    Robust,
    SidedObjective,
    SLiC,
    SumOfTerms,
    TopOne,
    apo_down,
    apo_zero,
    bco,
    cpo,
    kto_pair,
    nca,
    simpo,
    sppo_hard,
)
from foretune.scores import Convention


class Loss(NamedTuple):
    """A loss of TRL's.

    Attributes:
        make: the objective, of the run's arguments (TRL's `sigmoid` takes no notice of `label_smoothing`).
        convention: what scores the objective is given.
    """

    make: Callable[[DPOConfig], Objective | SidedObjective]
    convention: Convention = Convention()


PER_TOKEN = Convention(per_token=True)
# loss_type of DPOTrainer, where it is a loss of one pair.
LOSSES = {
    "sigmoid": Loss(lambda arguments: DPO(beta=arguments.beta)),
    "hinge": Loss(lambda arguments: SLiC(beta=arguments.beta)),
    "ipo": Loss(lambda arguments: IPO(beta=arguments.beta), PER_TOKEN),
    "exo_pair": Loss(lambda arguments: EXO(beta=arguments.beta, rate=arguments.label_smoothing)),
    "robust": Loss(lambda arguments: Robust(base=DPO(beta=arguments.beta), rate=arguments.label_smoothing)),
    "discopop": Loss(lambda arguments: DiscoPOP(beta=arguments.beta, tau=arguments.discopop_tau)),
    "sigmoid_norm": Loss(lambda arguments: DPO(beta=arguments.beta), PER_TOKEN),
    "nca_pair": Loss(lambda arguments: nca(beta=arguments.beta)),
    "bco_pair": Loss(lambda arguments: bco(beta=arguments.beta)),
    "sppo_hard": Loss(lambda arguments: sppo_hard(beta=arguments.beta)),
    "apo_zero": Loss(lambda arguments: apo_zero(beta=arguments.beta)),
    "apo_down": Loss(lambda arguments: apo_down(beta=arguments.beta)),
}
# Why a loss, as TRL has it, is no function of one pair's two scores.
NO_PAIR = {
    "aot": "it sorts the margins of a batch, so it is no function of one pair",
    "aot_unpaired": "it sorts the scores of a batch, so it is no function of one pair",
    "sft": "it learns from the chosen responses alone, a mean over the tokens of a batch",
    "cpo": "its likelihood term is a mean over the chosen tokens of a batch",
    "orpo": "its likelihood term is taken over the prompt as well, and over the tokens of a batch",
}
# Losses of other trainers than DPOTrainer, by `--method`.
OTHERS = {
    "simpo": Loss(lambda arguments: simpo(beta=arguments.beta), Convention(per_token=True, reference=False)),
    "cpo": Loss(lambda arguments: cpo(base=DPO(beta=arguments.beta)), Convention(reference=False)),
    "orpo": Loss(lambda arguments: ORPO(strength=arguments.beta), Convention(per_token=True, reference=False)),
    "kto": Loss(lambda arguments: kto_pair(beta=arguments.beta)),
}
# Losses of whole rankings: of their own, and TRL's of all pairs.
RANKING_LOSSES = ("plackett_luce", "pairwise", "top1")
PAIRWISE = ("sigmoid", "hinge", "exo_pair", "robust", "discopop")
# What only DPOTrainer knows.
OF_DPO = (
    *("loss_type", "loss_weights", "label_smoothing", "discopop_tau", "f_divergence_type", "f_alpha_divergence_coef"),
    *("ld_alpha", "use_weighting", "sync_ref_model", "ranking_loss"),
)
# Those that can be forecast: of the margin alone, and of both scores.
OF_MARGINS = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "simpo")
FORECAST = (*OF_MARGINS, "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "kto")
# Those of rows of one response each, two of which a pair is.
OF_RESPONSES = ("kto",)


def check_method(name: str, explicit: Collection[str]) -> None:
    """Refuse options that a method's trainer does not have.

    Raises:
        UserError: such an option.
    """
    if name != "dpo" and (strange := [option for option in OF_DPO if option in explicit]):
        raise UserError(f"{strange[0]} is an option of DPOTrainer alone: leave it out with --method {name}.")


def objective_of(name: str, arguments: DPOConfig) -> Objective | SidedObjective:
    """The objective of a loss that can be forecast.

    Raises:
        UserError: a loss that is no function of one pair's scores, or arguments that it is not defined for.
    """
    if name not in FORECAST:
        raise UserError(
            f"{name} cannot be forecast: {NO_PAIR.get(name, 'TRL 1.16 has no such loss')}; use one of "
            f"{', '.join(FORECAST)}, or `foretune train` alone, which runs every loss."
        )
    try:
        return (LOSSES | OTHERS)[name].make(arguments)
    except ValueError as error:
        raise UserError(f"{name} cannot be forecast with these arguments: {error}") from error


def margin_loss(objective: Objective | SidedObjective | RankingObjective) -> Objective:
    """The loss of an unpaired row as a function of its score, or less that where it is undesirable.

    Both terms of KTO are one function of these where its reference point is 0.
    """
    assert isinstance(objective, SumOfTerms) and len({term.loss for term in objective.terms}) == 1
    return objective.terms[0].loss


def convention_of(name: str) -> Convention:
    """The scores that a loss is given."""
    loss = (LOSSES | OTHERS).get(name)
    return loss.convention if loss else Convention()


def ranking_objective_of(name: str, arguments: DPOConfig) -> RankingObjective:
    """The objective of whole rankings.

    Args:
        name: one of RANKING_LOSSES.
        arguments: the run's; `pairwise` takes TRL's loss for its pairs.

    Raises:
        UserError: another name, or a loss of pairs that does not go with it.
    """
    losses = arguments.loss_type
    if name not in RANKING_LOSSES:
        raise UserError(f"ranking_loss '{name}' is none of {', '.join(RANKING_LOSSES)}.")
    if name == "pairwise":
        if len(losses) != 1 or losses[0] not in PAIRWISE:
            raise UserError(
                f"loss_type {' + '.join(losses)} is no loss of one summed margin, which the pairs of a ranking need: "
                f"use one of {', '.join(PAIRWISE)}."
            )
        base = objective_of(losses[0], arguments)
        assert isinstance(base, Objective)
        return Pairwise(base=base)
    if losses != ["sigmoid"]:
        raise UserError(
            f"ranking_loss {name} is a loss of its own: leave out --loss_type {' '.join(losses)}, or use "
            "--ranking_loss pairwise."
        )
    return {"plackett_luce": PlackettLuce, "top1": TopOne}[name](beta=arguments.beta)
