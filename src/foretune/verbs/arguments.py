"""foretune's own arguments, beside TRL's."""

from dataclasses import dataclass, field

from foretune.training.build import TRAINABLE
from foretune.verbs.losses import OTHERS, RANKING_LOSSES

TWINS = ("output_layer", "weight_space", "tangent")


@dataclass
class SharedArguments:
    """What foretune adds to the arguments of every TRL trainer."""

    behaviour_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that names each row's behaviour. Default: the first of behaviour, behavior, category, "
            "subset, source, channel, task_name, topic that exists."
        },
    )
    weight_column: str = field(default="weight", metadata={"help": "Column of row weights (all 1 if missing)."})
    behaviours: list[str] | None = field(default=None, metadata={"help": "Use only these behaviours."})
    test_fraction: float = field(
        default=0.2, metadata={"help": "Share of each behaviour's prompts held out where the data has no test split."}
    )
    max_pairs_per_behaviour: int | None = field(
        default=None, metadata={"help": "Use at most this many training pairs of each behaviour."}
    )
    observations: int = field(
        default=9, metadata={"help": "Steps, evenly spread, at which forecast and run are measured on every behaviour."}
    )
    observe_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Pairs of each behaviour and split that are measured at those steps. Default: 50; where "
            "`foretune forecast` can then take features of adapters more than once for a quarter of the run, fewer (at "
            "least 20)."
        },
    )
    restart: bool = field(default=False, metadata={"help": "Discard what the run folder holds and start anew."})


@dataclass
class ForetuneArguments(SharedArguments):
    """What foretune adds to the arguments of `trl dpo`."""

    method: str = field(
        default="dpo",
        metadata={
            "help": "TRL's trainer: dpo (any --loss_type), simpo or cpo (CPOTrainer), orpo, kto (pairs as two rows).",
            "choices": ["dpo", *OTHERS],
        },
    )
    trainable: str | None = field(
        default=None,
        metadata={
            "help": "What is trained: unembedding (the output layer alone, the paper's setting), lora, or full. "
            "Default: lora with --use_peft, else full.",
            "choices": list(TRAINABLE),
        },
    )
    ranking_loss: str | None = field(
        default=None,
        metadata={
            "help": "Loss of rankings of K responses (data with prompt and responses): plackett_luce, pairwise (the "
            "mean of --loss_type over all pairs) or top1 (the best against the others).",
            "choices": list(RANKING_LOSSES),
        },
    )
    forecast_alone: bool | None = field(
        default=None,
        metadata={"help": "Also forecast each behaviour trained alone. Default: where the output layer is simulated."},
    )
    forecast_displacement: bool = field(
        default=False,
        metadata={
            "help": "Also forecast how likely chosen and rejected responses become, each by itself, for twice the "
            "features. Losses that treat both apart (nca_pair, kto, …) do so anyway."
        },
    )
    alone_mass: float = field(
        default=0.99,
        metadata={
            "help": "Share of probability on the rows of the output layer that those runs train; 1 is exact and slow. "
            "The joint run always trains all rows."
        },
    )
    twin: str | None = field(
        default=None,
        metadata={
            "help": "What the forecast simulates: output_layer (exact where it alone is trained), weight_space (LoRA, "
            "or all weights in the memory that training takes: margins linear in each layer's weight change) or "
            "tangent (margins linear in what is trained, of which it may sample coordinates). Default: by --trainable.",
            "choices": list(TWINS),
        },
    )
    twin_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Training pairs of each behaviour that the forecast's features are taken of; they stand for the "
            "rest of their behaviour. Default: 50; 10 to 20 where the run is long enough to take features of so few "
            "more than once; of free texts all, up to 100, where half the run's rows are more, else as many as two "
            "passes afford. In one pass, those that are observed are taken too."
        },
    )
    audit_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Audit at most this many pairs of each behaviour and split, and forecast the run of all rows from "
            "them (at least --observe_pairs and --twin_pairs are read). Default: all."
        },
    )
    factor_rank: int = field(
        default=4, metadata={"help": "Outer products kept of each pair's gradient in each layer (weight_space)."}
    )
    twin_coordinates: int = field(
        default=200_000,
        metadata={
            "help": "Coordinates of the trained parameters that the tangent twin simulates; all where they are no more."
        },
    )
    relinearise_every: int | None = field(
        default=None,
        metadata={
            "help": "Take the forecast's features anew every so many simulated steps (0: never). Default: a fifth of "
            "the steps where all passes together cost at most a quarter of the run, else less often."
        },
    )
    relinearise_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Take features anew as often as keeps the relative error of the margins at this, e.g. 0.2, and at "
            "least every fifth of the steps, at most every twentieth; intervals begin with --relinearise_every."
        },
    )
    band_runs: int = field(
        default=5,
        metadata={
            "help": "Simulated runs from other seeds (batch order, dropout, adapters) that make the forecast's 90 %% "
            "band (0: no band)."
        },
    )
    pilot_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Train this share of the steps really and forecast the rest; `foretune train` goes on from there."
        },
    )
    forecast_at: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the steps after which `foretune train` takes features of the model as it is then and "
            "forecasts the rest anew, e.g. 0.1 0.3."
        },
    )
    sketch_dim: int = field(
        default=4096, metadata={"help": "Length of the sketched gradient kept for each pair (error ~ 1/sqrt of it)."}
    )
    draws: int = field(default=1000, metadata={"help": "Bootstrap draws and permutations."})
    share_prompts: bool = field(
        default=True, metadata={"help": "Train with each prompt computed once for both responses (same numbers)."}
    )
