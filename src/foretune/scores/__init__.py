"""Scores: sequence log-probabilities of both responses."""

from foretune.scores.log_probs import PairScores, log_probs_of_states, pair_scores, score_pairs

__all__ = ["PairScores", "log_probs_of_states", "pair_scores", "score_pairs"]
