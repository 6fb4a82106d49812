"""The run folder: what each verb wrote, readable without torch."""

from foretune.records.run_folder import RunFolder, load_run

__all__ = ["RunFolder", "load_run"]
