"""Preference data: rows of prompt, chosen and rejected, each with a behaviour and a weight."""

from foretune.data.behaviours import BEHAVIOUR_COLUMNS
from foretune.data.formats import split_answers
from foretune.data.preferences import DataInfo, PreferenceData, load_preferences

__all__ = ["BEHAVIOUR_COLUMNS", "DataInfo", "PreferenceData", "load_preferences", "split_answers"]
