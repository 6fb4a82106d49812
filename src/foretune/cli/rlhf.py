"""`foretune rlhf`: a policy trained on a reward model, forecast beside outcome."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune.records import RunFolder
from foretune.verbs.progress import Progress
from foretune.verbs.rlhf import rlhf
from foretune.verbs.rlhf_job import parse_rlhf_job


def run(arguments: Sequence[str]) -> None:
    """Parse, forecast, train, show."""
    folder = rlhf(parse_rlhf_job(arguments, prog="foretune rlhf"), progress=Progress())
    console = Console()
    console.print(policy_table(folder))
    for behaviour, found in folder.record["rlhf"]["overoptimised"].items():
        told = (
            f"{behaviour}: over-optimised since step {found['peak_step']}: reward {found['reward']:+.3f}, held-out "
            f"reward {found['heldout_reward']:+.3f} since then."
        )
        console.print(Text(told))


def policy_table(folder: RunFolder) -> Table:
    """Reward, held-out reward and KL of each behaviour at the end, forecast and observed."""
    stored = folder.read_table("policy")
    assert stored is not None
    rows = stored.to_pylist()
    split = "test" if any(row["split"] == "test" for row in rows) else "train"
    last = max(row["step"] for row in rows)
    at = {
        (row["method"], row["behaviour"], row["step"]): row
        for row in rows
        if row["split"] == split and row["step"] in (0, last)
    }
    forecast = next(row["method"] for row in rows)
    shown = Table(title=f"After {last} steps ({split} prompts)", title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("behaviour", overflow="fold")
    for name in (
        "reward\nat first",
        "reward\nforecast",
        "reward\nobserved",
        "held-out\nat first",
        "held-out\nobserved",
    ):
        shown.add_column(name, justify="right")
    for name in ("KL\nforecast", "KL\nobserved"):
        shown.add_column(name, justify="right")
    for behaviour in dict.fromkeys(behaviour for _, behaviour, _ in at):
        first, end = at["observed", behaviour, 0], at["observed", behaviour, last]
        said = at[forecast, behaviour, last]
        cells = [first["reward"], said["reward"], end["reward"], first["heldout_reward"], end["heldout_reward"]]
        shown.add_row(Text(behaviour), *[f"{cell:.3f}" for cell in [*cells, said["kl"], end["kl"]]])
    return shown
