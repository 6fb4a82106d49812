"""The parts of docs/fidelity.md about changed runs: answers of `what_if` beside real ones, bands beside real seeds."""

from collections.abc import Iterator
from statistics import mean, median
from typing import Any


def what_if(asked: dict[str, Any]) -> Iterator[str]:
    """The study of counterfactual runs."""
    run, criteria = asked["run"], asked["criteria"]
    yield "\n## What-ifs beside real runs\n"
    yield (
        f"Written from `benchmarks/results/what_if.json` (`python benchmarks/what_if.py`): {len(run['behaviours'])} "
        f"persona test behaviours × {run['rows']} pairs, LoRA, AdamW 2e-4, {run['steps']} steps of {run['batch']}; "
        "each question changes one thing, is answered from the forecast's features, and is then really trained from "
        f"the same seed. A change is clear where it exceeds the seed noise, {asked['seed_noise']:.4f} (root mean "
        f"square difference of a behaviour's loss between seeds). Wanted: {criteria['questions']} questions, Spearman "
        f"{criteria['spearman']}, sign right {criteria['sign_right']}. Intervals are bootstraps over questions.\n"
    )
    if real := asked.get("real_runs"):
        most = max(abs(loss - run["loss"][name]) for name, loss in real["loss"].items())
        yield (
            f"The questions' real runs are of another machine (commit {real['commit']}); forecasts, answers, the base "
            f"run and those of other seeds are newer. The two base runs' losses differ by at most {most:.4f}.\n"
        )
    yield "| features | questions | changes (clear) | Spearman | sign right | seconds an answer, median (largest) |"
    yield "|---|---|---|---|---|---|"
    for name, found in asked["figures"].items():
        spans = {
            key: f"{found[key]:.2f} ({found['intervals'][key][0]:.2f} to {found['intervals'][key][1]:.2f})"
            for key in ("spearman", "sign_right")
        }
        took = asked["seconds"][name].values()
        yield (
            f"| {name} | {found['questions']} | {found['changes']} ({found['clear_changes']}) | {spans['spearman']} | "
            f"{spans['sign_right']} | {median(took):.1f} ({max(took):.1f}) |"
        )
    names = list(asked["figures"])
    yield "\nRank correlation over behaviours within each question, and the mean change of the loss:\n"
    yield f"| question | observed change | {' | '.join(f'{name}: change | Spearman' for name in names)} |"
    yield "|---|---|" + "---|---|" * len(names)
    for question, seen in asked["observed"].items():
        cells = [f"{mean(seen.values()):+.4f}"]
        for name in names:
            own = asked["figures"][name]["spearman_within_questions"][question]
            cells += [f"{mean(asked['answers'][name][question].values()):+.4f}", f"{own:.2f}"]
        yield f"| {question} | {' | '.join(cells)} |"


def bands(found: dict[str, Any]) -> Iterator[str]:
    """The study of other seeds."""
    yield "\n## Bands beside real runs from other seeds\n"
    yield (
        "Written from `benchmarks/results/bands.json` (`python benchmarks/bands.py`): the run of the what-ifs, for "
        "eight behaviours of each mixture. The 90 % band of a forecast is about other seeds (batch order, dropout, "
        f"adapters, stand-ins); here it is made of {found['runs']} simulated runs. Spread: root mean square over "
        "behaviours of the standard deviation of the final losses. Wanted: nine in ten differences between losses of "
        "two real seeds are within what the band allows. *Same seeds*: simulated from the seeds of the real runs; "
        "*correlation* of a seed's mean loss there with the real one. Intervals are bootstraps over the seeds.\n"
    )
    yield (
        "| mixture | features | spread in the band's runs | in real ones | seeds | differences allowed for | spread of "
        "the same seeds | correlation |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for mixture, own in found["mixtures"].items():
        for name, figures in own["forecasts"].items():
            real, held, like = (figures["intervals"][key] for key in ("real_sd", "held", "correlation"))
            yield (
                f"| {mixture} | {name} | {figures['simulated_sd']:.4f} | {figures['real_sd']:.4f} ({real[0]:.4f} to "
                f"{real[1]:.4f}) | {len(own['losses'])} | {figures['held']:.0%} ({held[0]:.0%} to {held[1]:.0%}) | "
                f"{figures['same_seeds_sd']:.4f} | {figures['correlation']:.2f} ({like[0]:.2f} to {like[1]:.2f}) |"
            )
