"""All verbs in turn on one job, data and model loaded once."""

from foretune import processes
from foretune.records import RunFolder
from foretune.verbs.audit import audit_prepared
from foretune.verbs.forecast import forecast_prepared
from foretune.verbs.job import Job
from foretune.verbs.prepare import prepare
from foretune.verbs.progress import Progress
from foretune.verbs.train import train_prepared
from foretune.verbs.verify import verify


def run_all(job: Job, progress: Progress, *, verbs: tuple[str, ...] = ("forecast", "train", "verify")) -> RunFolder:
    """Audit, then the named verbs, in one run folder; what is there already is kept."""
    if "forecast" in verbs:
        job.objective()  # refuse before any work
    prepared = prepare(job)
    run = audit_prepared(prepared, progress)
    if "forecast" in verbs:
        forecast_prepared(prepared, progress)
    if "train" in verbs:
        train_prepared(prepared, progress)
    if "verify" in verbs:
        processes.on_main(lambda: verify(run, progress=progress))
    return run
