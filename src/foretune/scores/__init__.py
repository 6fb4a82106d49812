"""Scores: log-probabilities of both responses, and what is made of them."""

from foretune.scores.convention import Convention
from foretune.scores.log_probs import PairScores, log_probs_of_states, pair_scores, score_pairs

__all__ = ["Convention", "PairScores", "log_probs_of_states", "pair_scores", "score_pairs"]
