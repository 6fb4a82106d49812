"""Our objectives beside the losses of TRL itself, called on log-probabilities of our own."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from foretune.objectives import (
    DPO,
    EXO,
    IPO,
    ORPO,
    DiscoPOP,
    LabelSmoothed,
    NegativeLogLikelihood,
    Objective,
    Robust,
    Shifted,
    SLiC,
    Unpaired,
    apo_down,
    apo_zero,
    bco,
    cpo,
    kto_pair,
    nca,
    simpo,
    sppo_hard,
    wpo_weights,
)

TOKENS = 6
MARGIN_LOSSES = {
    "sigmoid": lambda beta: DPO(beta=beta),
    "hinge": lambda beta: SLiC(beta=beta),
    "exo_pair": lambda beta: EXO(beta=beta, rate=0.2),
    "robust": lambda beta: Robust(base=DPO(beta=beta), rate=0.2),
    "discopop": lambda beta: DiscoPOP(beta=beta, tau=0.05),
    "ipo": lambda beta: IPO(beta=beta),
    "sigmoid_norm": lambda beta: DPO(beta=beta),
}
SIDED_LOSSES = {"nca_pair": nca, "bco_pair": bco, "sppo_hard": sppo_hard, "apo_zero": apo_zero, "apo_down": apo_down}
PER_TOKEN = {"ipo", "sigmoid_norm"}


class Pairs:
    """Log-probabilities of a few response tokens, chosen responses first, and of the reference; all float64."""

    def __init__(self, seed, scale, count=1):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, TOKENS, (2 * count,), generator=generator)
        mask = torch.arange(TOKENS) >= TOKENS - self.lengths[:, None]
        self.tokens = -torch.rand(mask.shape, generator=generator).double() * scale * mask
        self.reference = -torch.rand(2 * count, generator=generator).double() * scale * self.lengths
        self.purity = -torch.rand(mask.shape, generator=generator).double()
        self.mask = torch.cat([torch.zeros(2 * count, 1, dtype=torch.long), mask.long()], 1)

    def only(self, pair):
        """One of the pairs."""
        found, rows = Pairs(0, 1.0), [pair, pair + len(self.tokens) // 2]
        vars(found).update({name: value[rows] for name, value in vars(self).items()})
        return found

    @property
    def log_ratios(self):
        return (self.tokens.sum(1) - self.reference).numpy()

    def outputs(self, **_):
        shape = self.tokens.shape
        return SimpleNamespace(
            log_probs=self.tokens,
            log_sum_sq_probs=self.purity,
            entropy=torch.zeros(shape),
            mean_logits=torch.zeros(shape),
            is_top1=torch.zeros(shape, dtype=torch.bool),
        )


def accelerator():
    same = {"gather": lambda value: value, "gather_for_metrics": lambda value: value}
    return SimpleNamespace(device=torch.device("cpu"), **same)


def bare(trainer, **attributes):
    """A trainer of which there is only what its loss reads."""
    found = trainer.__new__(trainer)
    shared = {
        "accelerator": accelerator(),
        "model": SimpleNamespace(training=True),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
    }
    vars(found).update(shared | attributes)
    return found


def trl_loss(pair, loss_type, beta, *, smoothing=0.2, weighting=False):
    trainer = bare(
        DPOTrainer,
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=weighting,
        args=SimpleNamespace(discopop_tau=0.05),
    )
    inputs = {
        "input_ids": torch.ones_like(pair.mask),
        "attention_mask": torch.ones_like(pair.mask),
        "completion_mask": pair.mask,
        "ref_chosen_logps": pair.reference.chunk(2)[0],
        "ref_rejected_logps": pair.reference.chunk(2)[1],
    }
    return float(trainer._compute_loss(pair.outputs, inputs, False))


# reaches log-ratios beyond ±300; TRL's discopop is not a number once e^{−βm} overflows, which is left out
PAIRS = [Pairs(seed, scale) for seed, scale in enumerate([0.1, 1.0, 1.0, 3.0, 10.0, 30.0, 80.0, 80.0])]
BETAS = (0.01, 0.1, 1.0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("loss_type", MARGIN_LOSSES)
def test_losses_of_a_margin_are_those_of_trl(loss_type, beta):
    for pair in PAIRS:
        scores = pair.log_ratios / pair.lengths.numpy() if loss_type in PER_TOKEN else pair.log_ratios
        ours = MARGIN_LOSSES[loss_type](beta).value(np.array(scores[0] - scores[1]))
        rounded = 1e-7 if loss_type == "exo_pair" else 1e-12  # TRL keeps its label smoothing in float32
        np.testing.assert_allclose(ours, trl_loss(pair, loss_type, beta), rtol=1e-6, atol=rounded)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("loss_type", SIDED_LOSSES)
def test_losses_of_both_scores_are_those_of_trl(loss_type, beta):
    for pair in PAIRS:
        ours = SIDED_LOSSES[loss_type](beta=beta).value(*pair.log_ratios)
        np.testing.assert_allclose(ours, trl_loss(pair, loss_type, beta), rtol=1e-6, atol=1e-12)


def test_sft_of_one_pair_is_the_likelihood_per_token():
    for pair in PAIRS:
        ours = NegativeLogLikelihood().value(pair.tokens[0].sum().numpy() / pair.lengths[0].numpy())
        np.testing.assert_allclose(ours, trl_loss(pair, "sft", 0.1), rtol=1e-6)


def test_trl_smooths_no_labels_of_its_sigmoid():
    """So label_smoothing must not change the forecast of one either."""
    assert trl_loss(PAIRS[3], "sigmoid", 0.1, smoothing=0.4) == trl_loss(PAIRS[3], "sigmoid", 0.1, smoothing=0.0)


def test_wpo_multiplies_the_loss_of_a_pair():
    for pair in PAIRS[:3]:
        aligned = ((pair.tokens - pair.purity) * pair.mask[:, 1:]).sum(1) / pair.lengths
        weight = wpo_weights(*aligned.numpy())
        plain, weighted = (trl_loss(pair, "sigmoid", 0.1, weighting=chosen) for chosen in (False, True))
        np.testing.assert_allclose(weighted, weight * plain, rtol=1e-9)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_is_no_loss_of_one_pair(loss_type):
    """Its margins are differences of sorted batches, so a pair's loss changes with its neighbours."""
    batch = Pairs(0, 1.0, count=4)
    apart = np.mean([trl_loss(batch.only(pair), loss_type, 1.0) for pair in range(4)])
    assert abs(trl_loss(batch, loss_type, 1.0) - apart) > 1e-3


SCORES = torch.tensor(
    [[-0.5, -1.0], [-3.0, -0.2], [-20.0, -60.0], [-80.0, -1.0], [-1.0, -300.0]], dtype=torch.float64
).T


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "hinge", "ipo"])
def test_reference_free_losses_are_those_of_trls_cpo_trainer(loss_type, smoothing):
    beta, gamma = 0.5, 0.7
    trainer = bare(CPOTrainer, beta=beta, simpo_gamma=gamma, alpha=0.0, label_smoothing=smoothing, loss_type=loss_type)
    told = trainer.cpo_loss(*SCORES)[0].numpy()
    margin = (SCORES[0] - SCORES[1]).numpy()
    smoothed = LabelSmoothed(base=DPO(beta=beta), rate=smoothing)
    ours: dict[str, Objective] = {
        "sigmoid": smoothed,
        "simpo": Shifted(base=smoothed, by=gamma / beta),
        "hinge": SLiC(beta=beta),
        "ipo": IPO(beta=beta),
    }
    np.testing.assert_allclose(ours[loss_type].value(margin), told, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(cpo(base=ours[loss_type], alpha=0.0).value(*SCORES.numpy()), told, rtol=1e-12)
    if loss_type == "simpo" and not smoothing:
        np.testing.assert_allclose(simpo(beta=beta, gamma=gamma).value(margin), told, rtol=1e-12)


def test_the_odds_ratio_is_that_of_trls_orpo_trainer():
    told = -bare(ORPOTrainer, beta=0.3).odds_ratio_loss(*SCORES)[0].double().numpy()  # computed in float32
    ours = ORPO(strength=0.3, likelihood=0.0).value(*SCORES.numpy())
    np.testing.assert_allclose(ours, told, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_losses_of_unpaired_rows_are_those_of_trls_kto_trainer(loss_type):
    beta, shift = 0.3, 0.9
    trainer = bare(
        KTOTrainer,
        beta=beta,
        loss_type=loss_type,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda model, batch: torch.full((2,), shift, dtype=torch.float64),
    )
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    if loss_type == "kto":
        ours = Unpaired(kto_pair(beta=beta, reference_point=shift, **weights))
    else:
        ours = Unpaired(kto_pair(beta=beta, **weights))
    for pair in PAIRS:
        batch = {
            "input_ids": torch.ones_like(pair.mask),
            "attention_mask": torch.ones_like(pair.mask),
            "completion_mask": pair.mask,
            "label": torch.tensor([True, False]),
            "ref_logps": pair.reference,
            "ref_KL_logps": torch.zeros(2, dtype=torch.float64),
        }
        told = float(trainer._compute_loss(pair.outputs, batch, False))
        rows = ours.value(pair.log_ratios, np.array([True, False]))
        np.testing.assert_allclose(rows.mean(), told, rtol=1e-6, atol=1e-12)
