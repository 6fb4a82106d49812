"""Forecast a run of the output layer, then train it: the forecast is right to rounding.

Six bundled behaviours, the embedded model, AdamW as TRL has it. Run: `python examples/forecast_then_train.py`
"""

import tempfile

import foretune
from foretune.report import print_summary

SETTINGS = {
    "model_name_or_path": "smollm2-135m",
    "dataset_name": "bundled:statements",
    "behaviours": [
        "follows-buddhist-practice",
        "interest-in-mathematics",
        "desires-wealth",
        "prefers-planning",
        "seeks-influence",
        "welcomes-oversight",
    ],
    "max_pairs_per_behaviour": 24,
    "trainable": "unembedding",
    "dtype": "float32",  # bfloat16 would add its rounding to both sides
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 2,
    "observations": 4,
    "observe_pairs": 12,
    "disable_tqdm": True,
}


def main() -> None:
    """Forecast, train, compare."""
    with tempfile.TemporaryDirectory() as folder:
        run = foretune.forecast(**SETTINGS, output_dir=folder)
        print("forecast order:", ", ".join(run.record["forecast"]["learning_order"]))
        foretune.train(**SETTINGS, output_dir=folder)
        foretune.verify(run)
        print_summary(folder)
        found = run.read_json("verification.json")
    print(f"margin R² {found['margin_r2']:.5f}, slope {found['margin_slope']:.4f}, {found['num_pairs']} pairs")
    assert found["margin_r2"] > 0.99, found["margin_r2"]


if __name__ == "__main__":
    main()
