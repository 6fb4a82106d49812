"""foretune: know what preference tuning will do to your model before you run it.

The verbs, each continuing one run folder: `audit`, `forecast`, `train`, `verify`; `what_if` asks a forecast about a
changed run, `compare` runs several methods, `reward` does all of it for a reward model, `rlhf` maximises one,
`reproduce` tests the paper's claims, `load_run` opens a finished run. They are loaded on first use, so that importing
foretune is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretune.claims.reproduce import reproduce as reproduce
    from foretune.records import load_run as load_run
    from foretune.verbs.audit import audit as audit
    from foretune.verbs.compare import compare as compare
    from foretune.verbs.forecast import forecast as forecast
    from foretune.verbs.reward import reward as reward
    from foretune.verbs.rlhf import rlhf as rlhf
    from foretune.verbs.train import train as train
    from foretune.verbs.verify import verify as verify
    from foretune.verbs.what_if import what_if as what_if

__version__ = "0.1.0"
__all__ = ["audit", "compare", "forecast", "load_run", "reproduce", "reward", "rlhf", "train", "verify", "what_if"]

_HOMES = {
    "audit": "foretune.verbs.audit",
    "compare": "foretune.verbs.compare",
    "forecast": "foretune.verbs.forecast",
    "load_run": "foretune.records",
    "reproduce": "foretune.claims.reproduce",
    "reward": "foretune.verbs.reward",
    "rlhf": "foretune.verbs.rlhf",
    "train": "foretune.verbs.train",
    "verify": "foretune.verbs.verify",
    "what_if": "foretune.verbs.what_if",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'foretune' has no attribute '{name}'")
