"""The pages of a reproduction from claims.json alone."""

import json

import pytest

from foretune.errors import UserError
from foretune.report.reproduction import TONES, build_reproduction, claim_figure, estimate_words, print_reproduction

PLOT = {
    "x_label": "‖Δ‖",
    "y_label": "‖ΔW‖",
    "caption": "The more, the more.",
    "log": True,
    "diagonal": True,
    "series": [
        {
            "name": "a <b>",
            "x": [1.0, 2.0],
            "y": [1.5, None],
            "text": ["one", "two"],
            "mode": "markers",
            "dashed": False,
        },
        {"name": "a <b>, forecast", "x": [1.0, 2.0], "y": [1.0, 4.0], "text": None, "mode": "lines", "dashed": True},
    ],
}


def check(what, value, low, high, wanted, verdict):
    numbers = {"value": value, "low": low, "high": high}
    return {"what": what, **numbers, "wanted": wanted, "verdict": verdict, "source": "paper"}


CHECKS = [
    check("first", 0.95, 0.92, 0.99, "> 0.9", "shown"),
    check("second", 2.0, 1.5, 2.5, "2 ± 0.1", "not shown"),
    check("control: third", 7.0, 7.0, 7.0, None, None),
]
PAGES = [
    {"claim": "R1", "title": "Weights", "statement": "They move.", "source": "paper", "verdict": "not shown",
     "reason": None, "checks": CHECKS, "plots": [PLOT], "settings": {"K": [1, 2], "β": 0.01}, "notes": ["A note."],
     "seconds": 1.5},
    {"claim": "R10", "title": "Dialogue", "statement": "Too.", "source": "paper", "verdict": "not applicable",
     "reason": "there is no dialogue", "checks": [], "plots": [], "settings": {}, "notes": [], "seconds": 0.0},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"schema_version": 1, "stages": {}}))
    (tmp_path / "claims.json").write_text(json.dumps(PAGES))
    return tmp_path


def test_each_claim_has_a_section_with_its_numbers_and_reason(folder):
    page = build_reproduction(folder).read_text("utf-8")
    assert all(f'<section id="{item["claim"]}">' in page for item in PAGES)
    assert "1 not shown, 1 not applicable." in page
    assert "Not applicable: there is no dialogue." in page
    assert "0.950 (0.920 to 0.990)" in page and "control: third" in page and "A note." in page
    assert 'id="figure-R1-0"' in page and "K: 1, 2; β: 0.01." in page


def test_the_number_that_decides_stands_in_the_summary(folder, capsys):
    print_reproduction(folder)
    shown = capsys.readouterr().out
    assert "2.000 (1.500 to 2.500)" in shown and "0.950" not in shown and "not applicable" in shown


def test_figures_are_drawn_as_their_data_say():
    figure = claim_figure("R1-0", PLOT)
    first, second, diagonal = figure.traces
    assert first["name"] == "a &lt;b&gt;" and first["mode"] == "markers" and first["text"] == ["one", "two"]
    assert second["line"]["dash"] == "dot" and first["line"]["dash"] == "solid"
    assert first["line"]["color"] == second["line"]["color"]
    assert diagonal["x"] == [1.0, 4.0]
    assert figure.layout["xaxis"]["type"] == figure.layout["yaxis"]["type"] == "log"


def test_exact_numbers_have_no_interval():
    assert estimate_words(CHECKS[2]) == "7.000"
    assert estimate_words({"value": None, "low": None, "high": None}) == "–"


def test_every_verdict_has_a_colour():
    from foretune.claims import claim

    assert set(TONES) == {claim.SHOWN, claim.NOT_SHOWN, claim.OPPOSITE, claim.NOT_APPLICABLE}


def test_a_folder_without_claims_is_refused(folder):
    (folder / "claims.json").unlink()
    with pytest.raises(UserError, match="holds no reproduction: run `foretune reproduce"):
        build_reproduction(folder)
