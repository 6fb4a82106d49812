"""Write docs/benchmarks.md from results/: speed and memory, each figure as it was measured.

python benchmarks/table.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS, read

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
OPENING = """\
# Speed and memory

Written by `python benchmarks/table.py` from `benchmarks/results/`; `make bench` measures again. Methods take turns in
one run on one machine. A ratio is the median over rounds of (seconds of the other / seconds of foretune), least and
largest in brackets: machines differ and are noisy, ratios less so. Criteria were fixed before the first runs and stand
in each script's first lines; **missed** marks those that were not reached.
"""
FEATURES = """\
## Features

Hidden states, log-probabilities and gradient sketches of all pairs (`measure_pairs`) against a loop at batch size 1
with `output_hidden_states`, and against padded batches of separate sequences through the output layer.

| data, dtype | pairs/s | times the loop | times padded batches | tokens computed, of packed | share of matmul ceiling |
|---|---|---|---|---|---|"""
TRAINING = """\
## Training

`PreferenceTrainer` against TRL's `DPOTrainer`, both as they are by default: LoRA r = 8 on q and v, one epoch,
everything from the constructor to the last step.

| data, dtype | batch | rows/s | TRL's rows/s | times TRL | times TRL with precomputed references |
|---|---|---|---|---|---|"""
GRADIENTS = """\
## Gradients of every pair

LoRA r = 8 on q and v, whole, against dattri-llm 0.1.0, bergson 2.5.1 and a loop over pairs;
[how they were installed](../benchmarks/README.md). Memory: the peak without the gradients, over that of the bare pass.
*Work*: products that separate sequences and logits at all tokens take, over those of packed pairs and logits where a
response is scored. Where products are all that counts, no more than that can be gained.

| data, dtype | pairs | work | times dattri-llm | times bergson | times the loop | memory |
|---|---|---|---|---|---|---|"""
# Weights of the embedded model that a token meets in its layers, and at the output.
LAYER_WEIGHTS, HEAD_WEIGHTS = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536), 576 * 49152
MEMORY = """\
## Memory of an audit

Peak resident memory of the process (the kernel's VmHWM, mapped files included), tiny model.

| behaviours | pairs | peak of the largest over peak of the smallest | bytes a pair |
|---|---|---|---|"""
SCALING = """\
## How the pass grows

Exponents of seconds, with 95 % intervals ([the plan](many-machines.md) assumes 1).

| fit | exponent | points |
|---|---|---|"""
COST = """\
## What a forecast costs beside its run

`foretune forecast --audit_pairs n --twin_pairs n --observe_pairs n` of one epoch of LoRA on {rows:,} rows of 20
behaviours ({steps:,} steps of 16, {run_seconds:.0f} s): reading and encoding all rows, the sample's audit, its features
from step 0, the simulation and its bands. CPU seconds of one thread, over those of the run.

| n, of each behaviour | runs of the band | rows, of the run's | CPU s | of which reading | share of the run |
|---|---|---|---|---|---|"""

WHAT_IF = """\
## How long a what-if takes

`what_if` on forecasts of {pairs:,} pairs of 20 behaviours, {steps} simulated steps of 16, {threads} threads, wall-clock
seconds (criterion: each below 10).
"""


def main() -> None:
    """Write the page."""
    parts = [OPENING, *features(), *training(), *gradients(), *cost(), *answers(), *memory(), *scaling()]
    PAGE.write_text("\n".join(parts) + "\n")


def ratio(found: dict[str, float], criterion: float | None = None) -> str:
    """A ratio in words, with its range."""
    text = f"{found['median']:.1f} ({found['min']:.1f} to {found['max']:.1f})"
    return f"**{text}: missed**" if criterion and found["median"] < criterion else text


def on(machine: dict[str, Any]) -> str:
    """The machine in words."""
    features = f" with {', '.join(machine['features'])}" if machine["features"] else ""
    return f"{machine['threads']} threads of {machine['cpu']}{features}, torch {machine['versions']['torch']}."


def features() -> Iterator[str]:
    """The feature pass, machine by machine."""
    for path in sorted(RESULTS.glob("features*.json")):
        yield FEATURES if path.stem == "features" else "\n".join(FEATURES.splitlines()[-2:])
        yield from feature_rows(read(path.stem) or {})
        yield ""


def feature_rows(found: dict[str, Any]) -> Iterator[str]:
    """Of one file."""
    for name, study in found["studies"].items():
        criteria = {"loop": 5.0, "padded": 5.0} if name.startswith("persona") else {"loop": None, "padded": 2.0}
        cells = [ratio(study["times_faster"][rival], criteria[rival]) for rival in ("loop", "padded")]
        share = study["share_of_ceiling"]["forward_pass"]
        work = study["work"]
        yield (
            f"| {name} | {study['rows_per_second']['foretune']:.0f} | {cells[0]} | {cells[1]} "
            f"| {work['tokens_computed_a_pair']:.1f} of {work['tokens_a_pair']:.1f} "
            f"| {f'{share:.0%}' if share >= 0.75 else f'**{share:.0%}: missed (75 %)**'} |"
        )
    where = {name: on(study.get("machine", found["machine"])) for name, study in found["studies"].items()}
    for machine in dict.fromkeys(where.values()):
        names = "; ".join(name for name in where if where[name] == machine)
        text = f"{f'{names}: ' if len({*where.values()}) > 1 else ''}{machine} {found.get('note', '')}"
        yield f"\n{text.strip()}"


def training() -> Iterator[str]:
    """Training against TRL."""
    found = read("training")
    if found is None:
        return
    yield TRAINING
    for name, study in found["studies"].items():
        criterion = 4.0 if name.startswith("persona") else 1.7
        rates, faster = study["rows_per_second"], study["times_faster"]
        once = ratio(faster["TRL, references once"]) if "TRL, references once" in faster else "–"
        yield (
            f"| {name} | {study['batch']} | {rates['foretune']:.2g} | {rates['TRL']:.2g} "
            f"| {ratio(faster['TRL'], criterion)} | {once} |"
        )
    if same := found.get("same_losses"):
        yield (
            f"\nThe same losses: over {same['steps']} steps in float32 they differ by at most "
            f"{same['largest_difference']:.1g} (criterion: 1e-4)."
        )
    yield ""


def gradients() -> Iterator[str]:
    """Pair gradients against peers, machine by machine."""
    for path in sorted(RESULTS.glob("pair_gradients*.json")):
        found = read(path.stem) or {}
        yield GRADIENTS if path.stem == "pair_gradients" else "\n".join(GRADIENTS.splitlines()[-2:])
        for dtype in ("bfloat16", "float32"):
            for data, study in found.get(dtype, {}).items():
                faster = study["times_faster_than"]
                cells = [ratio(faster[name], 3.0) for name in ("dattri-llm", "bergson", "loop")]
                peak = study["memory"]["ratio"] if "memory" in study else None
                memory = "–" if peak is None else f"{peak:.2f}" if peak <= 1.25 else f"**{peak:.2f}: missed (1.25)**"
                cells = [str(study["num_pairs"]), f"{work_of(study['mean_tokens']):.1f}", *cells, memory]
                yield f"| {data}, {dtype} | {' | '.join(cells)} |"
        yield f"\n{' '.join([on(found['machine']), found.get('note', '')]).strip()}\n"


def work_of(tokens: dict[str, float]) -> float:
    """Products of separate sequences over those of packed pairs, from mean tokens of a pair's parts."""
    responses = tokens["chosen"] + tokens["rejected"]
    apart = (2 * tokens["prompt"] + responses) * (LAYER_WEIGHTS + HEAD_WEIGHTS)
    return apart / ((tokens["prompt"] + responses - 2) * LAYER_WEIGHTS + (responses - 1) * HEAD_WEIGHTS)


def cost() -> Iterator[str]:
    """Forecasts from a sample."""
    found = read("forecast_cost")
    if found is None:
        return
    yield COST.format(**found)
    for own in found["forecasts"]:
        share = f"{own['share']:.1%}" if own["share"] <= 0.05 else f"**{own['share']:.1%}: missed (5 %)**"
        seconds = f"{own['seconds']:.0f} | {own['reading_seconds']:.0f}"
        yield f"| {own['pairs']} | {own['band_runs']} | {own['rows_share']:.1%} | {seconds} | {share} |"
    without, with_band = found["forecasts"][-2:]
    one = (with_band["seconds"] - without["seconds"]) / with_band["band_runs"] / found["run_seconds"]
    verdict = "reached" if one <= 0.02 else "**missed**"
    yield f"\nOne simulated run takes {one:.1%} of the real one's seconds (criterion: at most 2 %: {verdict}).\n"


def answers() -> Iterator[str]:
    """What-ifs."""
    found = read("what_if_time")
    if found is None:
        return
    yield WHAT_IF.format(**found, threads=found["machine"]["threads"])
    forecasts = found["forecasts"]
    titles = [f"{name}{', looked at' * own['looked']} ({own['passes']})" for name, own in forecasts.items()]
    yield f"| question | {' | '.join(titles)} |\n|---{'|---' * len(titles)}|"
    for question in next(iter(forecasts.values()))["seconds"]:
        taken = [own["seconds"][question] for own in forecasts.values()]
        cells = [f"{seconds:.1f}" if seconds < 10 else f"**{seconds:.1f}: missed (10)**" for seconds in taken]
        yield f"| {question} | {' | '.join(cells)} |"
    yield "\nIn brackets: how often the forecast took its features.\n"


def memory() -> Iterator[str]:
    """Memory of an audit."""
    found = read("audit_memory")
    if found is None:
        return
    yield MEMORY
    for growth in found["growth"]:
        few, many = growth["pairs"][0], growth["pairs"][-1]
        peak = growth["peak_ratio"]
        text = f"{peak:.2f}" if peak <= 1.1 else f"**{peak:.2f}: missed (1.10)**"
        yield f"| {growth['behaviours']} | {few:,} to {many:,} | {text} | {growth['peak_bytes_a_pair']} |"
    yield ""


def scaling() -> Iterator[str]:
    """Growth of the pass."""
    found = read("scaling")
    if found is None:
        return
    yield SCALING
    for name, fit in found["fits"].items():
        yield f"| {name} | {fit['exponent']:.2f} ({fit['low']:.2f} to {fit['high']:.2f}) | {fit['points']} |"
    yield ""


if __name__ == "__main__":
    main()
