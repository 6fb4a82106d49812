"""Write docs/fidelity.md and its figure from results/fidelity/.

python benchmarks/fidelity_page.py
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from math import inf, log
from pathlib import Path
from statistics import mean, median
from typing import Any

from fidelity_drawing import figure, kind
from harness import RESULTS, read
from what_if_page import bands, what_if

from foretune.dynamics.confidence import LIKELY_ERRORS

LONGER = [(4.8e-5, 500, "bfloat16"), (4.8e-5, 500, "float32"), (1.2e-5, 2000, "bfloat16"), (1.2e-5, 2000, "float32")]
DOCS = Path(__file__).parent.parent / "docs"
OPENING = """\
# How well a forecast describes the run

Written by `python benchmarks/fidelity_page.py` from `benchmarks/results/fidelity/`, which `python
benchmarks/fidelity.py` measures (resumable; one CPU thread). SmolLM2-135M-Instruct with 4-bit weights, dequantised,
in bfloat16 where nothing else is said. Each run trains LoRA (r = 8, alpha = 16, on q and v, TRL's dropout of 0.05) or
all weights with DPO, β = 0.1, on 12 persona behaviours × 100 pairs, batches of 24 (500 or 2,000 steps: × 200 pairs,
batches of 6, in float32, and × 400 pairs, batches of 12, in bfloat16; free text: power-seeking, HH harmless and HH
helpful × 100 short pairs, batches of 12). A hash of the behaviour's name decided once whether it is a tuning or a test
behaviour; test mixtures are reported, all criteria were fixed before the first run.

- *twin*: `foretune forecast` from step 0; *n passes*: `--relinearise_every` a share 1/n of the steps; *n pairs*: of
  each behaviour that features are taken of (`--twin_pairs`, `--observe_pairs`). *Chosen* ones are the first in the
  order of the audit (`representative_rank`), as foretune takes them; where there are more pairs than n and the word is
  missing, the forecast is older and of those with the lowest ids, as good as drawn. *n held out*: so many more of each
  behaviour are measured and not trained on, which tell what pairs that stand for others learn by heart; on free text,
  five passes are older than the part of it that is taken off pair by pair. Of free texts as few as these, foretune
  measures all once (*100 pairs*), which was chosen on a tuning mixture ([design](../design/twin.md)).
- *n looked at*: so many pairs of each behaviour (`--observe_pairs`), the measured ones among them, are scored by the
  model itself with the weights of the simulated run's end. As many as are measured are scored at each anchor, too: not
  yet with all weights from step 0; it changes little ([design](../design/twin.md)). Several passes without a look
  are older still: margins went on from what was found at an anchor, not from halfway
  ([theory](theory.md#the-linearised-twin)), which high learning rates suffer from.
- *pilot*: the first 5, 10 or 20 % of the steps are trained really, the rest is forecast (`--pilot_fraction`).
- *persistence*: the pilot's own last losses and margins, taken for the end's. *Distinguishability* and *behaviour
  kernel*: the order that the audit gives. *Naive kernel*: mean cosine of a behaviour's mean hidden state with those
  of all behaviours: likeness of the texts, answers left out.
- *real run, n % of the steps*: the rival, the same run really trained for fewer steps, its schedule compressed; with
  its own learning rate, or a higher one. *Another seed*: the same run with another batch order, dropout and start:
  what noise allows.
- *cost*: rows that go forward and backward through the model, over those of the run; not forward passes: TRL's for the
  reference, the audit's, those that observe. *CPU s*: of one thread of a shared machine, the band's runs included.
- *end*: after the last step. *lazy*: the last observed step at which the mean loss is still at least 0.68. Spearman
  is of the behaviours' losses, observed ones over all 100 pairs of each; *same pairs*: over those that were forecast
  alone. R² and slope are of single pairs' margins. Medians over runs; in brackets the medians of the bounds of 95 %
  bootstrap intervals over behaviours.
- Some bfloat16 runs were trained anew on another machine (2,000 steps: mean loss at the end 0.495, now 0.488; others
  differ less): methods not repeated (`of_earlier_run`) are beside the earlier ones.
- *float32*: the same trained adapters, measured in float32. What a bfloat16 run observes of itself is rounded by a
  third of a nat a pair (standard deviation), as much as pairs have moved by the end of the lazy part.

![Figures at the end of the run against cost, by method](fidelity.svg)
"""
HEAD = (
    "| method | runs | cost | CPU s | Spearman, end | same pairs, end | R², end | slope, end "
    "| Spearman, lazy | same pairs, lazy | R², lazy | slope, lazy | R², float32, lazy | slope, float32, lazy |"
)
RULE = "|---" * 14 + "|"
FIGURES = ("spearman_loss", "spearman_same_pairs", "margin_r2", "margin_slope")
ANOTHER_SEED = "real run, another seed"
Result = dict[str, Any]
Figures = dict[str, list[dict[str, Any]]]
TRAINED, DTYPES = {"lora": "LoRA", "full": "All weights"}, ("bfloat16", "float32")


def main() -> None:
    """Write both."""
    results = [json.loads(path.read_text()) for path in sorted((RESULTS / "fidelity").glob("*.json"))]
    tested = [result for result in results if result["run"]["mixture"].startswith("test")]
    groups = defaultdict(list)
    for result in tested:
        run = result["run"]
        data = "text" if run["mixture"].endswith("text") else "persona"
        setting = (data, run.get("trained", "lora"), run["optim"], run["learning_rate"], run["steps"])
        groups[*setting, dtype_of(result)].append(result)
    parts = [OPENING]
    main_group = groups["persona", "lora", "adamw_torch", 2e-4, 120, "bfloat16"]
    exact = groups.get(("persona", "lora", "adamw_torch", 2e-4, 120, "float32"), [])
    (DOCS / "fidelity.svg").write_text(figure(by_method(main_group)))
    parts.append("\n## What had to be reached")
    parts += all_criteria(groups, [*main_group, *exact], now=True)
    for setting, members in sorted(groups.items(), key=lambda item: item[1] is not main_group):
        data, trained, optim, rate, steps, dtype = setting
        where = "Free text: " if data == "text" else ""
        exactly = ", in float32" if dtype == "float32" else ""
        parts += section(f"{where}{TRAINED[trained]}, {optim} {rate:g}, {steps} steps{exactly}", members)
    tuning = [result for result in results if result not in tested]
    for trained, dtype in product(TRAINED, DTYPES):
        if members := [own for own in tuning if (own["run"].get("trained", "lora"), dtype_of(own)) == (trained, dtype)]:
            parts += section(f"Tuning mixtures, {TRAINED[trained]}, {dtype}: what defaults were chosen on", members)
    parts.append("\n## Earlier and dearer forms beside the same bounds")
    parts += all_criteria(groups, [*main_group, *exact], now=False)
    longer = [groups.get(("persona", "lora", "adamw_torch", *own), []) for own in LONGER]
    parts += samples([main_group, exact, *longer])
    parts += trust(tested, tuning)
    if asked := read("what_if"):
        parts += what_if(asked)
    if found := read("bands"):
        parts += bands(found)
    (DOCS / "fidelity.md").write_text("\n".join(parts).rstrip() + "\n")


def dtype_of(result: Result) -> str:
    """What the run was trained in."""
    return result["run"].get("dtype", "bfloat16")


def all_criteria(groups: dict[tuple, list[Result]], adapters: list[Result], *, now: bool) -> Iterator[str]:
    """What had to be reached, and what was: by forecasts as foretune makes them now, or by all others."""
    yield from criteria(by_method(adapters), now=now)
    if now:
        yield from beside_baselines(adapters)
    fully = [run for dtype in DTYPES for run in groups.get(("persona", "full", "adamw_torch", 5e-6, 120, dtype), [])]
    yield from as_good_as(by_method(adapters), by_method(fully), now=now)
    lengths = ((1.2e-5, 2000, "5 %", (0, 0.06)), (4.8e-5, 500, "10 %", (0.06, 0.12)))
    for (rate, steps, share, cost), dtype in product(lengths, DTYPES):
        long = groups.get(("persona", "lora", "adamw_torch", rate, steps, dtype), [])
        yield from beside_rivals(f"LoRA, {steps:,} steps, {dtype}, {share} of its rows", by_method(long), cost, now=now)


def is_now(name: str) -> bool:
    """Whether a forecast is made so today: what is not measured is looked at."""
    return "looked at" in name


def criteria(methods: Figures, *, now: bool) -> Iterator[str]:
    """Forecasts of adapters beside their bounds."""
    steady = {"margin_slope": (0.8, 1.25)}
    early = {"spearman_loss": (0.9, 1), "margin_r2": (0.8, 1)}
    strict = {"spearman_loss": (0.95, 1), "margin_r2": (0.9, 1), **steady}
    wanted = [
        *((f"pilot 10%, {pairs} pairs", "end", early) for pairs in ("30 chosen", "100")),
        *((f"pilot 20%, {pairs} pairs", "end", strict) for pairs in ("30 chosen", "100")),
        *(
            (f"twin, {passes} passes, {pairs} pairs", "end", strict)
            for pairs in ("30", "30 chosen", "100")
            for passes in (5, 10, 15)
        ),
        *((f"pilot 10%, {passes} passes, 100 pairs", "end", early) for passes in (2, 5)),
        ("pilot 20%, 5 passes, 100 pairs", "end", strict),
        *((f"twin, 5 passes, {pairs} chosen pairs, 100 looked at", "end", strict) for pairs in (10, 20)),
        ("pilot 10%, 5 passes, 20 chosen pairs, 100 looked at", "end", early),
        ("pilot 20%, 5 passes, 20 chosen pairs, 100 looked at", "end", strict),
        (ANOTHER_SEED, "end", strict),
        *(
            ("twin, 100 pairs", part, {"margin_r2": (0.95, 1), "margin_slope": (0.9, 1.1)})
            for part in ("lazy", "float32_lazy")
        ),
    ]
    yield (
        "\nLoRA, AdamW 2e-4, 120 steps, in bfloat16 and in float32. *Found* is the median over runs; the last column "
        "judges each run."
    )
    if now:
        yield "A real run of another seed tells what noise allows. Bounds of the last line: each run's best baselines."
    yield ""
    today = [is_now(name) or name == ANOTHER_SEED or "lazy" in part for name, part, _ in wanted]
    yield from judged(methods, [own for own, is_today in zip(wanted, today, strict=True) if is_today == now])


def judged(methods: Figures, wanted: list[tuple[str, str, dict[str, tuple[float, float]]]]) -> Iterator[str]:
    """Methods beside what was wanted of them: the part of the run, and by figure the least and the most."""
    yield "| method | runs | part | figure | wanted | found | |\n|---|---|---|---|---|---|---|"
    for name, part, bounds in wanted:
        for key, (low, high) in bounds.items() if name in methods else ():
            value = middle(methods[name], part, key)
            span = f"≥ {low:.2f}" if high == 1 else f"{low:g} to {high:g}"
            each = [low <= middle([entry], part, key) <= high for entry in methods[name] if entry.get(part)]
            verdict = "reached" if all(each) else f"**reached in {sum(each)} of {len(each)} runs**"
            verdict = verdict if any(each) else "**missed**"
            yield f"| {name} | {len(methods[name])} | {part} | {WORDS[key]} | {span} | {value:.3f} | {verdict} |"


def as_good_as(adapters: Figures, weights: Figures, *, now: bool) -> Iterator[str]:
    """Forecasts of all weights: within 0.05 of what LoRA's had to reach, and of what they reached."""
    strict = {"spearman_loss": (0.9, 1), "margin_r2": (0.85, 1), "margin_slope": (0.8, 1.25)}
    early = {"spearman_loss": (0.85, 1), "margin_r2": (0.75, 1)}
    weights = {name: found for name, found in weights.items() if is_now(name) == now}
    names = [name for name in weights if kind(name) == "pilot" or (kind(name), "passes" in name) == ("twin", True)]
    yield "\nAll weights, AdamW 5e-6, 120 steps, in bfloat16 and in float32; wanted is LoRA's bound less 0.05.\n"
    yield from judged(weights, [(name, "end", early if "pilot 10%" in name else strict) for name in sorted(names)])
    yield "\nThe same beside LoRA's figures less 0.05.\n"
    yield "| method | runs | figure | wanted | found | |\n|---|---|---|---|---|---|"
    for name in (name for name in weights if kind(name) in ("twin", "pilot")):
        peers = adapters.get(name.replace(", rank 4", ""), [])
        for key in ("spearman_loss", "spearman_same_pairs", "margin_r2") if peers else ():
            least, value = middle(peers, "end", key) - 0.05, middle(weights[name], "end", key)
            verdict = "reached" if value >= least else "**missed**"
            yield f"| {name} | {len(weights[name])} | {WORDS[key]} | ≥ {least:.3f} | {value:.3f} | {verdict} |"


def beside_rivals(what: str, methods: Figures, cost: tuple[float, float], *, now: bool) -> Iterator[str]:
    """What a share of a long run's rows buys: forecasts that cost so much, and shorter real runs at their best rate."""
    rivals = [entries for name, entries in methods.items() if kind(name) == "shorter"]
    twins = [name for name in methods if kind(name) == "twin" and cost[0] <= methods[name][0]["cost"] <= cost[1]]
    twins = [name for name in twins if is_now(name) == now]
    if not (rivals and twins):
        return
    yield f"\n{what}; the bound is the best of {len(rivals)} shorter real runs, figure by figure.\n"
    yield "| method | runs | figure | wanted | found | |\n|---|---|---|---|---|---|"
    for name in twins:
        for key in ("spearman_loss", "spearman_same_pairs", "margin_r2", "loss_mae"):
            sign = -1 if key == "loss_mae" else 1
            best = max((middle(entries, "end", key) for entries in rivals), key=lambda value: sign * value)
            value = middle(methods[name], "end", key)
            verdict, side = "reached" if sign * value > sign * best else "**missed**", "<" if sign < 0 else ">"
            yield f"| {name} | {len(methods[name])} | {WORDS[key]} | {side} {best:.3f} | {value:.3f} | {verdict} |"


WORDS = {"spearman_loss": "Spearman of the losses", "margin_r2": "margin R²", "margin_slope": "slope"}
WORDS |= {"spearman_same_pairs": "Spearman, same pairs", "loss_mae": "mean error of the losses"}


def beside_baselines(members: list[Result]) -> Iterator[str]:
    """Each run's forecast from step 0 beside what forecasts nothing, the losses of its longest pilot included."""
    name, found = "twin, 100 pairs", []
    for methods in (own["methods"] for own in members if name in own["methods"]):
        idle = [entry for other, entry in methods.items() if kind(other) in (None, "persistence")]
        found.append((methods[name]["end"]["spearman_loss"], max(entry["end"]["spearman_loss"] for entry in idle)))
    better = sum(ours > best for ours, best in found)
    verdict = "reached" if better == len(found) else f"**reached in {better} of {len(found)} runs**"
    spans = " / ".join(f"{best:.2f}" for _, best in found)
    middle_one = median(ours for ours, _ in found)
    yield f"| {name} | {len(found)} | end | {WORDS['spearman_loss']} | > {spans} | {middle_one:.3f} | {verdict} |"


def middle(found: list[dict[str, Any]], part: str, key: str) -> float:
    """Median over runs."""
    values = [entry[part][key] for entry in found if entry.get(part) and entry[part].get(key) is not None]
    return median(values) if values else float("nan")


def section(title: str, members: list[Result]) -> Iterator[str]:
    """One table."""
    ends = [result["observed"]["mean_loss"][-1] for result in members]
    seconds = median(result["observed"]["seconds"] for result in members)
    took = f"; the run itself takes {seconds:.0f} CPU seconds" if seconds else ""  # a resumed run knows no time
    mixtures = sorted({result["run"]["mixture"] for result in members})
    runs = f"{len(members)} runs" if len(members) > 1 else "one run"
    yield f"\n## {title}\n"
    yield (
        f"{runs[0].upper()}{runs[1:]} ({', '.join(mixtures)}); the mean loss ends at "
        f"{' / '.join(f'{end:.3f}' for end in ends)}{took}.\n"
    )
    yield HEAD
    yield RULE
    for name, found in sorted(by_method(members).items(), key=lambda item: order(item[0], item[1])):
        cells = [cell(found, part, key) for part in ("end", "lazy") for key in FIGURES]
        cells += [cell(found, "float32_lazy", key) for key in FIGURES[2:]]
        cost = median(entry["cost"] for entry in found)
        times = [entry["seconds"] for entry in found if entry.get("seconds")]
        seconds_taken = f"{median(times):.0f}" if times else "–"
        yield f"| {name} | {len(found)} | {cost:.2f} | {seconds_taken} | {' | '.join(cells)} |"


def samples(settings: list[list[Result]]) -> Iterator[str]:
    """What features of fewer pairs cost in accuracy."""
    yield "\n## Forecasts from fewer pairs\n"
    yield (
        "Features of n pairs of each behaviour, which stand for all the rest; everything else is as in the tables "
        "above. Spearman and error of the losses are against all observed pairs of each behaviour; medians over runs.\n"
    )
    yield "| run | passes | pairs | runs | cost | CPU s | Spearman, end | R², end | slope, end | error of the losses |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for members in filter(None, settings):
        run = members[0]["run"]
        label = f"{run['steps']} steps, {run.get('rows', 100)} rows a behaviour, {run.get('dtype', 'bfloat16')}"
        found = [(*(own[0].get(key, 0) for key in SAMPLE), own) for own in from_start(members)]
        for passes, pairs, chosen, looked, entries in sorted(found, key=lambda item: item[:4]):
            cells = [f"{middle(entries, 'end', key):.2f}" for key in ("spearman_loss", "margin_r2", "margin_slope")]
            cells.append(f"{middle(entries, 'end', 'loss_mae'):.3f}")
            cost, took = (median(entry[key] for entry in entries) for key in ("cost", "seconds"))
            pairs = f"{pairs}{' chosen' if chosen else ''}{f', {looked} looked at' if looked else ''}"
            yield f"| {label} | {passes} | {pairs} | {len(entries)} | {cost:.2f} | {took:.0f} | {' | '.join(cells)} |"


SAMPLE = ("passes", "pairs", "chosen", "looked")


def from_start(members: list[Result]) -> Iterator[list[dict[str, Any]]]:
    """What is known of each forecast from step 0."""
    for name, entries in by_method(members).items():
        if kind(name) == "twin" and "rank" not in name:
            yield entries


def trust(tested: list[Result], tuning: list[Result]) -> Iterator[str]:
    """Whether what forecasts say of themselves is so."""
    rows = said(tested)
    if not rows:
        return
    yield "\n## Whether forecasts know what they are worth\n"
    yield (
        "All forecasts of test mixtures above that recorded it. *Confidence* is the word that "
        "`foretune forecast` gives each behaviour; the thresholds were chosen before these runs. The band is about "
        "batch order, dropout and sampled pairs, not about what first order leaves out: it is no band of the outcome, "
        "unless the end was looked at, which leaves little out.\n"
    )
    yield "| confidence | behaviours | median error of the loss | 90th percentile | observed loss in the band |"
    yield "|---|---|---|---|---|"
    groups = {word: [own for own in rows if own["word"] == word] for word in ("high", "medium", "low")}
    groups["any, looked at"] = [own for own in rows if own.get("looked")]
    for word, found in groups.items():
        errors = sorted(abs(own["loss_error"]) for own in found)
        held = sum(own["band"][0] <= -own["loss_error"] <= own["band"][1] for own in found)
        late = errors[int(0.9 * (len(errors) - 1))]
        yield f"| {word} | {len(found)} | {median(errors):.3f} | {late:.3f} | {held / len(found):.0%} |"
    yield (
        "\nThe *likely loss* is one. Around the forecast, in units of the mean change that is forecast, it reaches "
        "from the least to the largest error of the tuning mixture; its 12 behaviours do not allow finer percentiles. "
        "That it hangs on the number of passes and not on the word was decided when both had been seen. From five "
        "passes on the lower end was -0.35, and held 77%, until another forecast of the tuning mixture erred by more.\n"
    )
    yield "| passes | errors of tuning behaviours | likely loss, less the forecast | of test behaviours | held |"
    yield "|---|---|---|---|---|"
    chosen_on, most = said(tuning), inf
    for least, (low, high) in LIKELY_ERRORS.items():
        tuned, found = (
            [own["relative"] for own in part if least <= own["passes"] < most] for part in (chosen_on, rows)
        )
        held = f"{mean(low <= error <= high for error in found):.0%}"
        passes = f"{least} or more" if most == inf else f"{least} to {most - 1}"
        span = f"{min(tuned):.2f} to {max(tuned):.2f} ({len(tuned)})"
        yield f"| {passes} | {span} | {low:g} to {high:g} | {len(found)} | {held} |"
        most = least


def said(results: list[Result]) -> list[dict[str, Any]]:
    """What forecasts said of single behaviours, with the error in units of the mean change that was forecast."""
    rows = []
    for result in results:
        for entry in result["methods"].values():
            if "trust" in entry:
                change = mean(abs(loss - log(2)) for loss in entry["losses"].values())
                for own in entry["trust"].values():
                    rows.append(entry | own | {"relative": -own["loss_error"] / change})
    return rows


def by_method(members: list[Result]) -> Figures:
    """What is known of each method; other seeds are one method."""
    found: Figures = defaultdict(list)
    for result in members:
        for name, entry in result["methods"].items():
            found[ANOTHER_SEED if name.startswith("real run, seed") else name].append(entry)
    return found


def order(name: str, found: list[dict[str, Any]]) -> tuple[int, float, str]:
    """Baselines, forecasts by cost, shorter runs by cost, other seeds."""
    kinds = [None, "persistence", "twin", "pilot", "shorter", "seed"]
    return kinds.index(kind(name)), median(entry["cost"] for entry in found), name


def cell(found: list[dict[str, Any]], part: str, key: str) -> str:
    """Median over runs, with the medians of the bounds of their intervals."""
    entries = [entry[part] for entry in found if entry.get(part) and entry[part].get(key) is not None]
    if not entries:
        return "–"
    bounds = [median(entry["intervals"][key][side] for entry in entries) for side in (0, 1)]
    value = f"{median(entry[key] for entry in entries):.2f}"
    return f"{value} ({bounds[0]:.2f} to {bounds[1]:.2f})" if part == "end" else value


if __name__ == "__main__":
    main()
