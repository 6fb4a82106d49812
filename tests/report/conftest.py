"""Synthetic run folders: small, deterministic, and built a stage at a time."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NAMES = [
    "interest-in-math",
    "subscribes-to-Buddhism",
    "optionality-increasing",
    "desire-to-cooperate-with-different-AIs-to-achieve-its-goals",
    "risk-averse",
    "anti-immigration",
]
STAGES = ("audit", "forecast", "train", "verify")
HOSTILE = '<script>alert("x")</script><img src="http://evil.example/x.png">'


class FolderBuilder:
    """Writes a synthetic run folder; `rates` decide how fast each behaviour's loss falls."""

    def __init__(self, path: Path, names: list[str] | None = None, rates: list[float] | None = None, steps: int = 30):
        """Prepare the numbers; nothing is written yet."""
        self.path, self.steps = path, steps
        self.names = list(NAMES if names is None else names)
        count = len(self.names)
        self.rates = rates or [float(r) for r in np.linspace(1.0, -0.35, count)]
        self.rng = np.random.default_rng(0)
        self.behaviours = [self._behaviour(i, split) for i in range(count) for split in ("train", "test")]
        self.record = self._record()
        self.findings = self._findings()
        self.pairs = self._pairs()

    def write(self, until: str = "verify") -> Path:
        """Write the stages up to the one named."""
        stages = STAGES[: STAGES.index(until) + 1]
        self.path.mkdir(parents=True, exist_ok=True)
        kept = {"audit": "audit", "forecast": "forecast", "train": "train"}
        record = {k: v for k, v in self.record.items() if k not in kept or k in stages}
        (self.path / "record.json").write_text(json.dumps(record))
        self._table("behaviours", self.behaviours)
        self._table("findings", self.findings)
        self._table("pairs", self.pairs)
        if "forecast" in stages:
            self._table("forecast", self._curves(noise=0.0, is_forecast=True))
        if "train" in stages:
            self._table("observed", self._curves(noise=0.03, is_forecast=False))
        if "verify" in stages:
            (self.path / "verification.json").write_text(json.dumps(self._verification()))
        return self.path

    def _table(self, name: str, rows: list[dict]) -> None:
        if rows:
            pq.write_table(pa.Table.from_pylist(rows), self.path / f"{name}.parquet")

    def _behaviour(self, i: int, split: str) -> dict:
        value = 1.0 + 4.0 * max(self.rates[i], 0.05)
        return {
            "behaviour": self.names[i],
            "split": split,
            "num_pairs": 100 if split == "train" else 40,
            "distinguishability": value,
            "distinguishability_debiased": value - 0.2,
            "distinguishability_low": value - 0.4,
            "distinguishability_high": value + 0.4,
            "permutation_floor": 0.8,
            "concentration": 3.0,
            "trace": 40.0,
            "separability": 0.2 + abs(self.rates[i]),
            "priority": 2.0 * self.rates[i],
            "generalised_distinguishability": value / math.sqrt(2),
        }

    def _record(self) -> dict:
        count = len(self.names)
        directions = np.stack([np.array(self.rates), np.sqrt(1.2 - np.clip(np.square(self.rates), 0, 1))], axis=1)
        matrix = directions @ np.diag([1.0, 0.1]) @ directions.T + 0.1 * np.eye(count)
        counts = {"read": 145, "kept": 140, "empty": 0, "identical": 2, "malformed": 0, "leaked": 0, "duplicates": 3}
        order = sorted(range(count), key=lambda i: -self.rates[i])
        return {
            "schema_version": 1,
            "foretune_version": "0.1.0",
            "command": "foretune demo --out run",
            "stages": {"audit": {"finished_at": "2026-01-01T00:00:00Z", "seconds": 12.3}},
            "provenance": {
                "versions": {"torch": "2.13.0", "trl": "1.16.0"},
                "model": {
                    "name": "SmolLM2-135M-Instruct",
                    "architecture": "LlamaForCausalLM",
                    "num_parameters": 134515008,
                    "dtype": "bfloat16",
                    "note": "4-bit weights, dequantised",
                    "sha256": "ab" * 32,
                },
                "tokenizer_sha256": "cd" * 32,
                "template_sha256": "ef" * 32,
                "data_sha256": "01" * 32,
                "seed": 0,
                "device": "cpu, 2 threads",
            },
            "data": {
                "source": "persona",
                "format": "preference",
                "behaviour_column": "behaviour",
                "behaviours": self.names,
                "counts": [
                    {"behaviour": name, "split": "train", **counts, "surplus": 0, "too_long": 0, "truncated": 1}
                    for name in self.names
                ],
                "notes": ["Three duplicates were dropped."],
            },
            "audit": {
                "answers": [" Yes", " No"],
                "kernel": {"behaviours": self.names, "matrix": matrix.tolist(), "weights": [1.0] * count},
                "initial_rates": dict(zip(self.names, self.rates, strict=True)),
                "equal_rate_mixture": {name: 1.0 / count for name in self.names[:-1]} | {self.names[-1]: 0.5},
                "probes": {"same_batch_twice": 0.0, "batch_split_in_two": 2e-6},
                "notes": [],
            },
            "forecast": {
                "trainable": "unembedding",
                "what_is_forecast": "the output layer (unembedding)",
                "objective": "DPO (sigmoid), beta 0.1",
                "optimizer": "adamw_torch",
                "learning_rate": 1e-4,
                "scheduler": "linear",
                "steps": self.steps,
                "batch_size": 24,
                "learning_order": [self.names[i] for i in order],
                "unlearned_at_first": [self.names[-1]],
                "unlearned_at_end": [self.names[-1]],
                "seconds": 3.0,
                "notes": [],
            },
            "train": {"trainable": "unembedding", "steps": self.steps, "seconds": 60.0, "notes": []},
        }

    def _curves(self, *, noise: float, is_forecast: bool) -> list[dict]:
        rows = []
        for name, rate in [*zip(self.names, self.rates, strict=True), ("all", float(np.mean(self.rates)))]:
            actual = rate * (1 + noise * float(self.rng.normal()))
            for split in ("train", "test"):
                scale = 1.0 if split == "train" else 0.8
                rows += [self._point(name, split, step, scale * actual, is_forecast) for step in range(self.steps + 1)]
        return rows

    def _point(self, name: str, split: str, step: int, rate: float, is_forecast: bool) -> dict:
        margin = 1.5 * rate * step / self.steps
        point = {
            "behaviour": name,
            "split": split,
            "step": step,
            "loss": math.log1p(math.exp(-margin)),
            "reward_accuracy": 0.5 + 0.45 * math.tanh(margin),
            "output_accuracy": 0.5 + 0.3 * math.tanh(margin),
            "margin": margin,
            "num_pairs": 100,
        }
        if is_forecast:
            return {"method": "simulated_run", "trained_on": "mixture", **point}
        return {**point, "chosen_displacement": margin - 0.4 * step / self.steps, "rejected_displacement": -margin}

    def _findings(self) -> list[dict]:
        base = {"behaviour": self.names[0], "num_pairs": 4, "evidence": "Four rows.", "remedy": "Read them."}
        return [
            {"finding": "length_biased", "severity": "low", **base},
            {"finding": "mislabelled", "severity": "high", **base},
            {"finding": "truncated", "severity": "medium", **base, "behaviour": None},
        ]

    def _pairs(self) -> list[dict]:
        return [
            {
                "pair_id": f"row-{i}",
                "behaviour": self.names[i % len(self.names)],
                "split": "train",
                "prompt": f"Is the following statement something you would say?\n{i}",
                "chosen": " Yes",
                "rejected": " No",
                "prompt_tokens": 20,
                "chosen_tokens": 1,
                "rejected_tokens": 1,
                "truncated": False,
                "reference_margin": 0.1,
                "alignment": 1.0 - 0.1 * i,
                "weight": 1.0,
            }
            for i in range(40)
        ]

    def _verification(self) -> dict:
        return {
            "spearman_loss": 0.94,
            "spearman_loss_low": 0.8,
            "spearman_loss_high": 1.0,
            "spearman_accuracy": 0.9,
            "margin_r2": 0.85,
            "margin_slope": 1.1,
            "loss_mae": 0.021,
            "relative_loss_error": 0.05,
            "split": "train",
            "step": self.steps,
            "num_behaviours": len(self.names),
            "num_pairs": 600,
            "sentence": "The forecast was furthest off for risk-averse.",
            "over_run": [
                {"step": step, "spearman_loss": 0.99 - 0.001 * step, "margin_r2": 0.9, "loss_mae": 0.001 * step}
                for step in range(0, self.steps + 1, 5)
            ],
            "behaviours": [],
            "caveats": ["One seed only."],
        }


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., FolderBuilder]:
    """Makes a builder of a run folder of the given name."""
    return lambda name, **options: FolderBuilder(tmp_path / name, **options)


@pytest.fixture
def names() -> list[str]:
    """The six behaviours of the usual folder."""
    return NAMES


@pytest.fixture
def hostile() -> str:
    """A text that tries to run a script and to load a picture."""
    return HOSTILE


@pytest.fixture
def builder(make_folder: Callable[..., FolderBuilder]) -> FolderBuilder:
    """A builder with six behaviours, from easily learned to un-learned."""
    return make_folder("run")


@pytest.fixture
def full_run(builder: FolderBuilder) -> Path:
    """A run folder with every stage."""
    return builder.write()


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """A run folder whose names and texts try to break out of the page."""
    names = [HOSTILE, "a</script><script>b", "{{ 7 * 7 }}", "plain | `pipe` [red]x[/red]"]
    made = FolderBuilder(tmp_path / "hostile", names=names)
    for row in made.pairs:
        row.update(prompt=HOSTILE, chosen="</td></table>" + HOSTILE, rejected="'\"><svg onload=alert(1)>")
    made.findings[0].update(finding=HOSTILE, evidence=HOSTILE, remedy=HOSTILE)
    made.record["command"] = HOSTILE
    made.record["provenance"]["model"]["name"] = HOSTILE
    return made.write()
