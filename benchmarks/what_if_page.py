"""The part of docs/fidelity.md about changed runs: answers of `what_if` beside real ones."""

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
    yield (
        "\nThe 90 % band of these forecasts is about other seeds (batch order, dropout, adapters, stand-ins). Real "
        "runs from other seeds beside it:\n"
    )
    yield "| features | spread of simulated losses | of real ones | differences between real seeds that it allows for |"
    yield "|---|---|---|---|"
    for name, own in asked["bands"].items():
        held = f"{own['held']:.0%} of {own['losses']}"
        yield f"| {name} | {own['simulated_sd']:.4f} | {own['real_sd']:.4f} | {held} |"
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
