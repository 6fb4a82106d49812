"""Observed pairs without features are scored with the simulated weights at the end, whatever the rows and the loss."""

import numpy as np
import pytest
from tests.cli.test_rankings import both, command
from tests.cli.test_sided import LORA
from tests.cli.test_unpaired import KTO

from foretune.records import load_run

FLAGS = ("--relinearise_every", "1", "--twin_pairs", "4", "--observe_pairs", "50", "--factor_rank", "32", *LORA)


@pytest.mark.parametrize(
    ("data", "more"),
    [
        ("unequal_file", ("--loss_type", "nca_pair")),
        ("unequal_file", ("--loss_type", "sigmoid_norm")),
        ("unpaired_file", KTO),
        ("rankings_file", ("--ranking_loss", "plackett_luce")),
    ],
    ids=["sided", "per token", "unpaired", "rankings"],
)
def test_what_is_looked_at_is_nearer_to_the_run(data, more, tiny_folder, tmp_path, request):
    file = request.getfixturevalue(data)
    both(command(tiny_folder, file, tmp_path, *FLAGS, *more, "--learning_rate", "0.0003"))
    folder = load_run(tmp_path)
    assert folder.record["forecast"]["look_explains"] > 0.95
    said, missed, observed = (
        folder.read_arrays(name)[part]
        for name, part in (("forecast_pairs", "margins"), ("forecast_pairs", "missed"), ("observed_pairs", "margins"))
    )
    missed = missed[: said.shape[1]]  # chosen scores may follow
    others = missed != 0
    assert 0 < others.sum() < len(others)
    looked, stood_for = (
        np.corrcoef(found[others], observed[-1][others])[0, 1] for found in (said[-1], said[-1] - missed)
    )
    assert looked > stood_for + 0.2
