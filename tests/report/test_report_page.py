"""The page: self-contained, escaped, with the sections that its folder has the data for."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from foretune.report import build_report, model_card_block, print_summary, to_json

SECTIONS = ["actions", "behaviours", "curves", "verification", "kernel", "mixture", "displacement", "pairs", "data"]
VOID = {"meta", "img", "br", "link", "input", "hr", "rect", "line"}


class Page(HTMLParser):
    """Collects a page's elements, ids and scripts, and checks that tags are balanced."""

    def __init__(self, text: str):
        """Parse the whole text."""
        super().__init__()
        self.tags, self.ids, self.attributes, self.open, self.texts = [], [], [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"unbalanced </{tag}>"

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def built(path: Path) -> str:
    page = build_report(path).read_text(encoding="utf-8")
    return page.replace(get_plotlyjs().replace("</script", "<\\/script"), "")


def parsed(path: Path) -> Page:
    page = Page(built(path))
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    return page


def test_full_page_has_every_section_and_one_plotly(full_run):
    assert [name for name in SECTIONS if name not in parsed(full_run).ids] == []
    assert build_report(full_run).read_text().count("plotly.js v") == get_plotlyjs().count("plotly.js v")
    assert [path.name for path in full_run.iterdir() if path.name.startswith(".report")] == []


@pytest.mark.parametrize(
    ("until", "absent"),
    [
        ("audit", {"curves", "verification", "displacement"}),
        ("forecast", {"verification", "displacement"}),
        ("train", set()),
    ],
)
def test_sections_appear_with_their_data(builder, until, absent):
    ids = parsed(builder.write(until)).ids
    assert {name for name in SECTIONS if name not in ids} == absent
    assert "missing" in ids


def test_links_lead_to_sections(full_run):
    page = parsed(full_run)
    links = [value[1:] for name, value in page.attributes if name == "href"]
    assert len(links) == len(SECTIONS) and set(links) <= set(page.ids)


def test_missing_section_goes_when_all_is_there(full_run):
    assert "missing" not in parsed(full_run).ids


def test_a_bare_record_makes_a_page_without_plotly(tmp_path):
    (tmp_path / "record.json").write_text("{}")
    page = build_report(tmp_path).read_text()
    assert len(page) < 50_000
    assert "names no behaviours yet" in page


@pytest.mark.parametrize("fixture", ["full_run", "hostile_run"])
def test_nothing_is_loaded_from_anywhere(fixture, request):
    text = built(request.getfixturevalue(fixture))
    page = Page(text)
    for name, value in page.attributes:
        assert name not in ("src", "href", "srcset", "data", "action") or not re.match(r"\s*(https?:)?//", value or "")
        assert not name.startswith("on"), f"an event handler attribute: {name}={value}"
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    styles = "".join(page.texts["style"])
    assert "@import" not in styles and "url(" not in styles


def test_hostile_text_is_shown_and_never_run(hostile_run):
    text = built(hostile_run)
    assert text.count("<script") == 3
    assert "<img" not in text and "<svg onload" not in text
    assert "&lt;script&gt;alert" in text
    assert "{{ 7 * 7 }}" in text
    assert Page(text).open == []


def test_figures_are_valid_json_without_markup(hostile_run):
    text = built(hostile_run)
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.S).group(1)
    assert "<" not in found
    names = [spec["name"] for spec in json.loads(found)]
    assert names == ["curves", "scatter", "agreement", "kernel", "displacement"]
    labels = [trace["name"] for trace in json.loads(found)[0]["data"]]
    assert not any("<" in label for label in labels)


def test_nan_rows_are_dashes(builder):
    for row in builder.behaviours[:2]:
        row.update({key: float("nan") for key, value in row.items() if isinstance(value, float)})
    text = built(builder.write())
    assert "nan" not in re.sub(r"<script.*?</script>", "", text, flags=re.S).lower().replace("dominan", "")
    assert "–</td>" in text


def test_sixty_behaviours(make_folder):
    long_names = [f"behaviour-{i:02d}-with-a-name-so-long-that-it-must-be-cut-somewhere" for i in range(60)]
    path = make_folder("sixty", names=long_names, steps=400).write()
    page = parsed(path)
    assert sum(tag == "tr" for tag in page.tags) > 120
    assert build_report(path).stat().st_size < 12_000_000


def test_page_terminal_json_and_card_agree(full_run, names):
    rows = re.findall(
        r'<tr><th scope="row">([^<]+)</th>\s*<td data-value="([^"]+)"><span class="tag (?:good|warn|bad)',
        built(full_run),
    )
    on_page = dict(rows)
    found = {item["behaviour"]: item["verdict"] for item in to_json(full_run)["behaviours"]}
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    print_summary(full_run, console)
    terminal = console.export_text()
    card = model_card_block(full_run)
    assert on_page == found and set(found) == set(names)
    for name, verdict in found.items():
        assert re.search(rf"^ ?{re.escape(name)} +{re.escape(verdict)}  ", terminal, re.M)
        assert f"| {name} | {verdict} |" in card


def test_terminal_fits_eighty_columns_and_reads_no_markup(hostile_run):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    print_summary(hostile_run, console)
    text = console.export_text()
    assert "[red]x[/red]" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text


def test_confidence_stands_beside_the_forecast_it_is_of(builder, names):
    words = dict(zip(names, ["high", "medium", "low", "high", "low"], strict=False))  # of the last one nothing is known
    builder.record["forecast"]["confidence"] = {name: {"word": word, "score": 0.3} for name, word in words.items()}
    builder.record["forecast"]["likely_error"] = [-0.2, 0.1]
    folder = builder.write("forecast")
    page = build_report(folder).read_text()
    assert page.count('data-value="3">high</td>') == 2
    assert 'data-value="">–</td>' in page
    assert 'colspan="4">forecast' in page
    found = {item["behaviour"]: item for item in to_json(folder)["behaviours"]}
    assert {name: item["confidence"] for name, item in found.items()} == {name: words.get(name) for name in names}
    loss, likely = found[names[4]]["forecast"]["final_loss"], found[names[4]]["likely_loss"]
    assert likely == pytest.approx((loss - 0.2, loss + 0.1))
    said = f"{likely[0]:.2f}–{likely[1]:.2f}"
    assert f'<span class="flag">{said}</span>' in page and "<dt>likely loss</dt>" in page
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    print_summary(folder, console)
    terminal = console.export_text()
    assert re.search(rf"^ ?{names[4]} .* {said} +\d+%", terminal, re.M)
    assert max(len(line) for line in terminal.splitlines()) <= 80


def test_exact_forecasts_have_no_column_for_confidence(full_run):
    page = build_report(full_run).read_text()
    assert 'colspan="3">forecast' in page
    assert "<dt>confidence</dt>" not in page


def test_json_is_strict(builder):
    builder.behaviours[0]["priority"] = float("nan")
    found = to_json(builder.write())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["behaviours"][0]["observed"]["drop"] > 0
    assert found["missing"] == []


def test_card_escapes_user_text(hostile_run, hostile):
    card = model_card_block(hostile_run)
    assert hostile not in card and "<script" not in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)


def test_an_old_page_survives_a_failed_build(full_run, monkeypatch):
    page = build_report(full_run)
    before = page.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build_report(full_run)
    assert page.read_bytes() == before
    assert [path.name for path in full_run.iterdir() if path.name.startswith(".report")] == []
