"""How the feature pass grows: seconds against pairs and against parameters, with the exponents that the plan uses.

Random Llamas (same cost as trained ones) on random pairs of realistic lengths, and the embedded model on the smaller
numbers. Each point is written when it is finished; the same command again continues. A fit is a line through the
logarithms; its 95 % interval is Student's, from the scatter of the points around it.

    python benchmarks/scaling.py                                   # everything: hours
    python benchmarks/scaling.py --pairs 250 500 1000 --models 128x4 256x8 --output /tmp/scaling.json
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine
from scipy.stats import linregress, t
from transformers import LlamaConfig, LlamaForCausalLM

from foretune.features.store import ShardStore
from foretune.features.unembedding import measure_pairs
from foretune.models.batches import packed_length
from foretune.models.embedded import EMBEDDED_MODEL
from foretune.models.encoding import EncodedPair
from foretune.models.load import load_model, resolve_dtype

# small, so that the layers and not the output layer are most of the work
VOCABULARY = 8192
# tokens of a prompt and of a response: medians of log-normal lengths, as in short preference data
PROMPT, RESPONSE, SPREAD, LONGEST = 48, 24, 0.5, 512


def main() -> None:
    """Measure what is missing, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000])
    parser.add_argument("--embedded_pairs", type=int, nargs="*", default=[1000, 3000])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["128x4", "256x8", "512x8", "768x12", "1024x24", "2048x20"],
        help="width x layers",
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scaling.json"))
    given = parser.parse_args()
    dtype = resolve_dtype("auto", torch.device("cpu"))
    smallest = min(given.pairs)
    wanted = [(given.models[0], count) for count in given.pairs]
    wanted += [(name, smallest) for name in given.models[1:]]
    wanted += [(EMBEDDED_MODEL, count) for count in given.embedded_pairs]
    content = json.loads(given.output.read_text()) if given.output.exists() else {"points": []}
    for name, count in wanted:
        if not any((point["model"], point["pairs"]) == (name, count) for point in content["points"]):
            content["points"].append(measure(name, count, dtype))
            content |= {"fits": fits(content["points"]), "machine": machine()}
            given.output.parent.mkdir(parents=True, exist_ok=True)
            scratch = given.output.with_suffix(".partial")
            scratch.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(scratch, given.output)
    show(content)


def measure(name: str, count: int, dtype: torch.dtype) -> dict[str, Any]:
    """One pass over `count` random pairs."""
    model = embedded(dtype) if name == EMBEDDED_MODEL else random_model(name, dtype)
    pairs = random_pairs(count)
    with tempfile.TemporaryDirectory() as folder:
        measure_pairs(model, pairs[:16], ShardStore(Path(folder) / "warm", "warm"))
        store = ShardStore(Path(folder) / "features", "scaling")
        start = time.perf_counter()
        measure_pairs(model, pairs, store, progress=lambda done: print(f"{name}: {done}/{count}", end="\r"))
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in store.folder.iterdir())
    head = model.get_output_embeddings().weight
    body = model.num_parameters() - head.numel()  # tied: the embedding is the head; looked up, not multiplied
    return {
        "model": name,
        "parameters": body + head.numel(),
        "pairs": count,
        "tokens": sum(map(packed_length, pairs)),
        "seconds": round(seconds, 3),
        "pairs_per_second": round(count / seconds, 2),
        "bytes_per_pair": round(size / count),
        "dtype": str(dtype).removeprefix("torch."),
    }


def embedded(dtype: torch.dtype) -> torch.nn.Module:
    """The embedded model."""
    return load_model(EMBEDDED_MODEL, dtype=dtype).model


def random_model(name: str, dtype: torch.dtype = torch.float32, *, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A Llama of `width x layers` with random weights, its output layer tied."""
    width, layers = map(int, name.split("x"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=2 * LONGEST,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def random_pairs(count: int) -> list[EncodedPair]:
    """Pairs of random tokens."""
    generator = np.random.default_rng(0)
    medians = np.array([PROMPT, RESPONSE, RESPONSE])
    lengths = np.exp(np.log(medians) + SPREAD * generator.standard_normal((count, 3))).astype(int).clip(2, LONGEST)
    return [
        EncodedPair(
            index, "random", "train", 1.0, *(generator.integers(VOCABULARY, size=n).tolist() for n in row), False
        )
        for index, row in enumerate(lengths)
    ]


def fits(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Exponents of seconds against pairs, for each model, and of random ones against parameters."""
    found = {}
    for name in dict.fromkeys(point["model"] for point in points):
        mine = [point for point in points if point["model"] == name]
        if fit := exponent([point["pairs"] for point in mine], [point["seconds"] for point in mine]):
            found[f"seconds against pairs, {name}"] = fit
    random = [point for point in points if point["model"] != EMBEDDED_MODEL]
    smallest = min((point["pairs"] for point in random), default=0)
    same = [point for point in random if point["pairs"] == smallest]
    if fit := exponent([point["parameters"] for point in same], [point["seconds"] for point in same]):
        found[f"seconds against parameters, {smallest} pairs"] = fit
    return found


def exponent(x: list[float], y: list[float]) -> dict[str, float] | None:
    """The slope of log y against log x with its 95 % interval; None with fewer than three points."""
    if len(set(x)) < 3:
        return None
    line = linregress(np.log(x), np.log(y))
    half = t.ppf(0.975, len(x) - 2) * line.stderr
    return {"exponent": line.slope, "low": line.slope - half, "high": line.slope + half, "points": len(x)}


def show(content: dict[str, Any]) -> None:
    """Print points and fits."""
    columns = ("model", "parameters", "pairs", "tokens", "seconds", "pairs_per_second", "bytes_per_pair")
    print(" ".join(f"{name:>16}" for name in columns))
    for point in content["points"]:
        print(" ".join(f"{point[name]:>16}" for name in columns))
    for name, fit in content.get("fits", {}).items():
        print(f"{name}: {fit['exponent']:.3f} (95 % {fit['low']:.3f} to {fit['high']:.3f}, {fit['points']} points)")


if __name__ == "__main__":
    main()
