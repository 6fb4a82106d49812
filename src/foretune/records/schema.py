"""Columns of the tables in a run folder. Names are an interface: they are added to, never changed."""

import pyarrow as pa

SCHEMA_VERSION = 1

_TEXT, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_CURVE = [
    ("behaviour", _TEXT),
    ("split", _TEXT),
    ("step", _INT),
    ("loss", _FLOAT),
    ("reward_accuracy", _FLOAT),
    ("output_accuracy", _FLOAT),
    ("margin", _FLOAT),
    ("num_pairs", _INT),
]
# where runs from other seeds would be, 90 % of them; missing where none were simulated
_BAND = [(f"{name}_{end}", _FLOAT) for name in ("loss", "reward_accuracy", "margin") for end in ("low", "high")]
_DISPLACEMENT = [("chosen_displacement", _FLOAT), ("rejected_displacement", _FLOAT)]

TABLES = {
    "behaviours": pa.schema(
        [
            ("behaviour", _TEXT),
            ("split", _TEXT),
            ("num_pairs", _INT),
            ("distinguishability", _FLOAT),
            ("distinguishability_debiased", _FLOAT),
            ("distinguishability_low", _FLOAT),
            ("distinguishability_high", _FLOAT),
            ("permutation_floor", _FLOAT),
            ("concentration", _FLOAT),
            ("trace", _FLOAT),
            ("separability", _FLOAT),
            ("priority", _FLOAT),
            ("generalised_distinguishability", _FLOAT),
            ("generalised_distinguishability_debiased", _FLOAT),
            ("initial_rate", _FLOAT),
        ]
    ),
    # displacements are forecast where the loss treats both sides apart
    "forecast": pa.schema([("method", _TEXT), ("trained_on", _TEXT), *_CURVE, *_BAND, *_DISPLACEMENT]),
    "observed": pa.schema([*_CURVE, *_DISPLACEMENT]),
    "ensemble": pa.schema(
        [
            ("behaviour", _TEXT),
            ("split", _TEXT),
            ("members", _INT),
            *[(f"{name}{end}", _FLOAT) for name in ("reward_accuracy", "loss", "margin") for end in ("", "_spread")],
            ("agreement", _FLOAT),
            ("num_pairs", _INT),
        ]
    ),
    "policy": pa.schema(
        [
            ("method", _TEXT),
            ("behaviour", _TEXT),
            ("split", _TEXT),
            ("step", _INT),
            ("reward", _FLOAT),
            ("heldout_reward", _FLOAT),
            ("kl", _FLOAT),
            ("num_prompts", _INT),
        ]
    ),
    "findings": pa.schema(
        [
            ("finding", _TEXT),
            ("severity", _TEXT),
            ("behaviour", _TEXT),
            ("num_pairs", _INT),
            ("evidence", _TEXT),
            ("remedy", _TEXT),
        ]
    ),
    "pairs": pa.schema(
        [
            ("pair_id", _INT),
            # of rankings alone
            ("ranking", _INT),
            ("chosen_rank", _INT),
            ("rejected_rank", _INT),
            ("behaviour", _TEXT),
            ("split", _TEXT),
            ("prompt", _TEXT),
            ("chosen", _TEXT),
            ("rejected", _TEXT),
            ("prompt_tokens", _INT),
            ("chosen_tokens", _INT),
            ("rejected_tokens", _INT),
            ("truncated", _BOOL),
            ("reference_chosen_logp", _FLOAT),
            ("reference_rejected_logp", _FLOAT),
            ("reference_margin", _FLOAT),
            ("alignment", _FLOAT),
            ("representative_rank", _INT),
            ("weight", _FLOAT),
        ]
    ),
}
