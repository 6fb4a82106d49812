"""The runs that forecasts are laid beside, what is tried on each, and the data they are trained on."""

import hashlib
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from foretune.data import load_preferences

BEHAVIOURS, ROWS, BATCH = 12, 100, 24


class Run(NamedTuple):
    """A real run: LoRA, r = 8 and alpha = 16 on q and v, or all weights; TRL's defaults else."""

    mixture: str
    seed: int
    optim: str = "adamw_torch"
    learning_rate: float = 2e-4
    steps: int = 120
    trained: str = "lora"
    batch: int = BATCH
    rows: int = ROWS
    dtype: str = "bfloat16"
    observations: int = 11

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        size = f"{self.steps}x{self.batch}-{self.rows}rows" if (self.batch, self.rows) != (BATCH, ROWS) else self.steps
        trained = self.trained if self.dtype == "bfloat16" else f"{self.trained}-{self.dtype}"
        return f"{self.mixture}-{trained}-{self.optim}-{self.learning_rate:g}-{size}-seed{self.seed}"


class Forecast(NamedTuple):
    """A way to forecast: where its features are taken, and of how many pairs of each behaviour.

    `chosen`: they are the first in the order of the audit, not all that there are, nor (in older results) those with
    the lowest ids. `held`: pairs of each behaviour that are measured too, and not trained on. `looked`:
    of each behaviour, those among them, that the model scores with the weights of the simulated run's end.
    """

    passes: int = 1
    pilot: float = 0.0
    pairs: int = 30
    rank: int = 8
    chosen: bool = True
    held: int = 0
    looked: int = 0

    @property
    def name(self) -> str:
        """In results."""
        parts = [
            f"pilot {self.pilot:.0%}" if self.pilot else "twin",
            f"{self.passes} passes" if self.passes > 1 else "",
            f"{self.pairs}{' chosen' if self.chosen else ''} pairs",
            f"rank {self.rank}" if self.rank != 8 else "",
            f"{self.held} held out" if self.held else "",
            f"{self.looked} looked at" if self.looked else "",
        ]
        return ", ".join(part for part in parts if part)

    @property
    def folder(self) -> str:
        """Below the run's."""
        return self.name.replace(" ", "")


class Shorter(NamedTuple):
    """The rival: the same run with fewer steps, its schedule compressed, or with fewer rows."""

    share: float = 1.0
    rate_factor: float = 1.0
    rows: int | None = None

    @property
    def name(self) -> str:
        """In results."""
        parts = [
            f"{self.share:.0%} of the steps" if self.share < 1 else "all steps",
            f"learning rate times {self.rate_factor:g}" if self.rate_factor != 1 else "",
            f"{self.rows} rows" if self.rows else "",
        ]
        return "real run, " + ", ".join(part for part in parts if part)

    @property
    def folder(self) -> str:
        """Below the run's."""
        return "shorter" + self.name.replace(" ", "")


FEW = [Forecast(), Forecast(pilot=0.1), Forecast(passes=5), Forecast(pilot=0.2), Forecast(pilot=0.05)]
EVERY: dict[str, Any] = {"pairs": ROWS, "chosen": False}
ALL = [Forecast(pilot=pilot, **EVERY) for pilot in (0.0, 0.1, 0.2)]
PASSES = [Forecast(pilot=pilot, passes=5, **EVERY) for pilot in (0.0, 0.1, 0.2)]
PILOT_PASSES = Forecast(passes=2, pilot=0.1, **EVERY)
FULL_PASSES, FULL_PILOT_PASSES = Forecast(passes=5, rank=4), Forecast(passes=2, pilot=0.1, rank=4)
FULL_LOOKS = [Forecast(5, pilot, pairs=20, rank=4, looked=ROWS) for pilot in (0.0, 0.1, 0.2)]
MORE_PASSES = [Forecast(passes=10), Forecast(passes=10, **EVERY), Forecast(pilot=0.1, passes=5)]
SHORTER = [Shorter(0.1), Shorter(0.2), Shorter(0.1, 5.0), Shorter(0.2, 5.0)]
PILOTS = [PILOT_PASSES, *(Forecast(passes=2, pilot=pilot) for pilot in (0.1, 0.2))]
SAMPLES = [Forecast(pairs=pairs, passes=passes) for passes in (1, 5) for pairs in (5, 10, 20, 50)]
# much the same number of rows as few pairs often or many once, without and with held-out ones
ALLOCATIONS = [Forecast(pairs=50), Forecast(3, pairs=20), Forecast(5, pairs=10), Forecast(5, pairs=10, held=10)]
LOOKS = [Forecast(5, pairs=pairs, looked=ROWS) for pairs in (10, 20)]
LOOKS += [Forecast(5, pilot, pairs=20, looked=ROWS) for pilot in (0.1, 0.2, 0.05)]
CHOICES = [
    *(Forecast(rank=rank) for rank in (4, 8, 16)),
    *(Forecast(pilot=0.1, rank=rank) for rank in (4, 8, 16)),
    *(Forecast(pilot=pilot, pairs=10) for pilot in (0.0, 0.1)),
    *ALL[:2],
]
Method = Forecast | Shorter


# As many learning rates in sum as 120 steps of 2e-4, spread over more rows of more data.
LONG = Run("test-0", 0, learning_rate=4.8e-5, steps=500, batch=12, rows=400)
HALF_LONG = LONG._replace(batch=6, rows=200, dtype="float32")
LONGER = Run("test-0", 0, learning_rate=1.2e-5, steps=2000, batch=12, rows=400)
HALF_LONGER = LONGER._replace(batch=6, rows=200, dtype="float32", observations=5)
FULL = {"trained": "full", "learning_rate": 5e-6}


def at_cost(run: Run, share: float) -> list[Method]:
    """What this share of the run's rows buys: features, passes, or fewer steps at three rates."""
    rows = round(share * run.steps * run.batch / BEHAVIOURS)
    twins = [Forecast(passes, pairs=rows // passes) for passes in (1, 2, 5) if rows // passes <= run.rows]
    looks = [Forecast(5, pairs=rows // 5, looked=ROWS)] if rows // 5 < ROWS else []
    return [*twins, *looks, *(Shorter(share, factor) for factor in (1.0, 5.0, 1 / share))]


# Free text: responses of at most so many characters after prompts of at most twice as many.
TEXTS = {
    "test": {
        "power-seeking": "bipo/power-seeking",
        "harmless": "hh/harmless-base-test.jsonl.gz",
        "helpful": "learning_dynamics",
    },
    # two columns of the file that the helpful ones are not from, and the answer that people preferred
    "tuning": {
        "plain": ("chosen_gptsemantic", "reject_gptsemantic"),
        "relevant": ("chosen", "irr_train"),
        "best-answer": None,
    },
}
TEXT_LENGTH = 400
TEXT = Run("test-text", 0, batch=12)
COLUMNS = ["prompt", "chosen", "rejected", "behaviour"]


def plan() -> Iterator[tuple[Run, list[Method]]]:
    """Runs and what is tried on them, in the order of their worth."""
    yield Run("tuning-0", 0), [*FEW[:3]]
    yield Run("test-0", 0), [*FEW, PASSES[0], *SHORTER, PASSES[2], *ALL, *PILOTS, *SAMPLES]
    yield Run("test-0", 1), [*FEW[:1], PASSES[0], *SHORTER, *PILOTS]
    yield LONGER, [*at_cost(LONGER, 0.05), *LOOKS[2:], *(Forecast(pairs=pairs) for pairs in (20, 50, 200))]
    yield Run("tuning-0", 0, **FULL), [FEW[0], FEW[1], FEW[3]]
    yield Run("test-0", 0, **FULL), [FEW[0], FEW[1], FEW[3], *ALL]
    for mixture in ("tuning-0", "test-0"):
        yield Run(mixture, 0, dtype="float32", **FULL), [FULL_PASSES, FEW[0], FULL_PILOT_PASSES, FEW[3]]
    for seed in (1, 0, 2):
        yield Run("test-0", seed, **FULL), FULL_LOOKS
    yield LONG, [*at_cost(LONG, 0.1), *LOOKS[2:]]
    yield LONG._replace(seed=1), [*LOOKS, *at_cost(LONG, 0.1)[-3:]]
    yield LONG._replace(seed=2), LOOKS[1:]
    yield HALF_LONG, [*at_cost(HALF_LONG, 0.1), ALL[0], FEW[2]]
    yield HALF_LONGER, at_cost(HALF_LONGER, 0.05)
    yield Run("test-0", 2), [*FEW[:1], PASSES[0], *SHORTER, *PILOTS]
    yield (
        TEXT,
        [
            Forecast(5, pairs=20, held=20, looked=ROWS),
            *LOOKS[1:],
            FEW[0],
            FEW[2],
            FEW[1],
            ALL[0],
            PASSES[0],
            SHORTER[1],
            SHORTER[3],
        ],
    )
    held = [
        Forecast(held=30),
        Forecast(5, pairs=20, held=20),
        *(Forecast(pilot=pilot, held=30) for pilot in (0.1, 0.2)),
    ]
    for seed in (1, 2):
        yield TEXT._replace(seed=seed), [ALL[0], *LOOKS[1:]]
    yield TEXT._replace(dtype="float32", observations=5), [FEW[0], *held, SHORTER[3], SHORTER[1], ALL[0]]
    yield (
        TEXT._replace(mixture="tuning-text"),
        [
            LOOKS[1],
            ALL[0],
            Forecast(2, pairs=50, looked=ROWS),
            Forecast(2, **EVERY),
            Forecast(5, pairs=20, held=20, looked=ROWS),
            SHORTER[3],
        ],
    )
    yield Run("tuning-0", 0, learning_rate=4e-4), [LOOKS[1]]
    for rate in (1e-4, 4e-4):
        yield Run("test-0", 0, learning_rate=rate), [*LOOKS[1:], *FEW[:3], PASSES[0]]
    yield Run("test-0", 0, optim="sgd", learning_rate=0.2), [*LOOKS[1:], *SHORTER, *FEW[:3], PASSES[0]]
    for seed in (1, 2):
        yield Run("test-0", seed, optim="sgd", learning_rate=0.2), LOOKS[1:]
        for rate in (4e-4, 1e-4):
            yield Run("test-0", seed, learning_rate=rate), LOOKS[1:]
    yield Run("tuning-0", 0), [*LOOKS, *CHOICES, *PASSES, *MORE_PASSES]
    for mixture, seed in (("test-1", 0), ("test-0", 0), ("test-0", 1), ("test-0", 2), ("test-1", 1), ("test-1", 2)):
        yield Run(mixture, seed), [*LOOKS, *FEW, *ALL, *PASSES, *SHORTER]
    yield Run("test-0", 0), [*MORE_PASSES, Shorter(0.5), Shorter(rows=30)]
    # what rounding to bfloat16 adds to the run and hides from its observer
    yield Run("tuning-0", 0, dtype="float32"), [*MORE_PASSES[:1], *ALLOCATIONS]
    for mixture, seed in (("tuning-0", 0), ("test-1", 1), ("test-0", 0)):
        tried = [ALL[0], PILOT_PASSES, PASSES[0], *ALL[1:], *SHORTER, *FEW[:4], *SAMPLES, *LOOKS]
        yield Run(mixture, seed, dtype="float32"), tried


def split_of(behaviour: str) -> str:
    """Tuning or test, for ever."""
    return "test" if _hash(behaviour) % 2 else "tuning"


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def behaviours_of(mixture: str, data: Path) -> list[str]:
    """The dozen behaviours of a mixture, `tuning-0` or `test-1`; those of free text in `test-text`."""
    half, number = mixture.split("-")
    if number == "text":
        return list(TEXTS[half])
    names = sorted((path.stem for path in (data / "persona").glob("*.jsonl")), key=_hash)
    mine = [name for name in names if split_of(name) == half]
    return mine[int(number) * BEHAVIOURS :][:BEHAVIOURS]


def data_file(mixture: str, rows: int, data: Path, work: Path) -> Path:
    """The mixture's rows, the same for every seed; those of fewer rows are among those of more."""
    path = work / f"{mixture}-{rows}.jsonl"
    if not path.exists():
        half, number = mixture.split("-")
        names = behaviours_of(mixture, data)
        found = texts(half, rows, data) if number == "text" else statements(names, rows, data)
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def with_held(run: Run, held: int, data: Path, work: Path) -> dict[str, Any]:
    """Arguments for the run's rows to train on, and of each behaviour so many more that are held out."""
    if not held:
        return {}
    folder = work / f"{run.mixture}-{run.rows}-{held}"
    folder.mkdir(exist_ok=True)
    train, more = (
        data_file(run.mixture, rows, data, work).read_text().splitlines(keepends=True)
        for rows in (run.rows, run.rows + held)
    )
    known = set(train)
    (folder / "train.jsonl").write_text("".join(train))
    (folder / "test.jsonl").write_text("".join(row for row in more if row not in known))
    return {"dataset_name": str(folder), "behaviour_column": "behaviour"}


def statements(names: list[str], rows: int, data: Path) -> Iterator[dict[str, Any]]:
    """So many rows of each persona behaviour."""
    found = load_preferences(str(data / "persona"), behaviours=names, max_pairs_per_behaviour=rows, test_fraction=0.0)
    yield from found.train.select_columns(COLUMNS).to_list()


def texts(half: str, rows: int, data: Path) -> Iterator[dict[str, Any]]:
    """The first so many short rows of each source of free text."""
    for behaviour, source in TEXTS[half].items():
        if isinstance(source, str):
            found = load_preferences(str(data / source), test_fraction=0.0).train.select_columns(COLUMNS).to_list()
        else:
            found = columns(*source, data) if source else best_answers(data)
        short = [row for row in found if _is_short(row)]
        yield from (row | {"behaviour": behaviour} for row in short[:rows])


def columns(chosen: str, rejected: str, data: Path) -> Iterator[dict[str, Any]]:
    """Two of the responses that a prompt has there."""
    for line in (data / "learning_dynamics" / "formal_prob_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield {"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]}


def best_answers(data: Path) -> Iterator[dict[str, Any]]:
    """Of each question the first two answers of which people preferred one."""
    for row in json.loads((data / "finegrained_rlhf" / "dev_feedback.json").read_text()):
        pairs = zip(
            combinations((row[f"prediction {number}"] for number in range(1, 5)), 2), row["preference"], strict=True
        )
        better = [pair if preferred == 1 else pair[::-1] for pair, preferred in pairs if preferred]
        if better:
            yield {"prompt": row["question"], "chosen": better[0][0], "rejected": better[0][1]}


def _is_short(row: dict[str, Any]) -> bool:
    prompt, *responses = (len(row[column]) for column in COLUMNS[:3])
    return prompt <= 2 * TEXT_LENGTH and max(responses) <= TEXT_LENGTH
