"""Moments, distinguishability and kernels by loops over rows and pairs."""

import math

import numpy as np


def reference_moments(rows):
    """(mean, covariance) in two passes; the covariance is NaN with fewer than two rows."""
    count, dim = len(rows), rows.shape[1]
    mean, covariance = np.zeros(dim), np.zeros((dim, dim))
    for row in rows:
        mean += row / count
    for row in rows:
        for i in range(dim):
            for j in range(dim):
                covariance[i, j] += (row[i] - mean[i]) * (row[j] - mean[j])
    return mean, covariance / (count - 1) if count > 1 else np.full((dim, dim), np.nan)


def reference_distinguishability(plus, minus):
    """(‖Δ̂‖, its de-biased value, concentration, trace) of two classes."""
    (mean_plus, cov_plus), (mean_minus, cov_minus) = reference_moments(plus), reference_moments(minus)
    squared = sum((a - b) ** 2 for a, b in zip(mean_plus, mean_minus, strict=True))
    trace_plus, trace_minus = (sum(cov[i, i] for i in range(len(cov))) for cov in (cov_plus, cov_minus))
    bias = trace_plus / len(plus) + trace_minus / len(minus)
    concentration = max(np.linalg.eigvalsh(cov).max() for cov in (cov_plus, cov_minus))
    return math.sqrt(squared), math.sqrt(max(squared - bias, 0.0)), concentration, max(trace_plus, trace_minus)


def reference_paired_distinguishability(chosen, rejected):
    """(‖Δ̂‖, its de-biased value) of rows that carry both responses."""
    mean, covariance = reference_moments(chosen - rejected)
    squared = sum(value**2 for value in mean)
    return math.sqrt(squared), math.sqrt(max(squared - np.trace(covariance) / len(chosen), 0.0))


def reference_kernel(features):
    """K_ij = ⟨φ_i, φ_j⟩."""
    kernel = np.zeros((len(features), len(features)))
    for i, left in enumerate(features):
        for j, right in enumerate(features):
            kernel[i, j] = sum(a * b for a, b in zip(left.ravel(), right.ravel(), strict=True))
    return kernel


def reference_off_diagonal_mean(kernel):
    """The mean of K_ij over i ≠ j."""
    count = len(kernel)
    return sum(kernel[i, j] for i in range(count) for j in range(count) if i != j) / (count * (count - 1))


def reference_alignments(plus, minus):
    """Where each row of D+ lies along Δ when it is left out: 1 at its class mean, −1 at the other's."""
    found = []
    for index, row in enumerate(plus):
        own = np.delete(plus, index, 0).mean(0)
        other = minus.mean(0)
        along = own - other
        found.append(2 * sum((row - (own + other) / 2) * along) / sum(along * along))
    return found


def reference_paired_alignments(chosen, rejected):
    """Each row's difference along the mean difference of the others; 1 at that mean."""
    found = []
    for index, row in enumerate(chosen - rejected):
        others = np.delete(chosen - rejected, index, 0).mean(0)
        found.append(sum(row * others) / sum(others * others))
    return found


def distances_of_next(rows, chosen):
    """How far the mean feature of `chosen` and each further row would be from that of all; inf of those chosen.

    With the features of the kernel of `statistics.herding` written out.
    """
    directions = [row / (np.linalg.norm(row) or 1) for row in rows]
    features = np.array([np.concatenate([[1], np.sqrt(2) * u, np.outer(u, u).ravel()]) / 2 for u in directions])
    found = np.full(len(rows), np.inf)
    for place in set(range(len(rows))) - set(chosen):
        found[place] = np.linalg.norm(features[[*chosen, place]].mean(0) - features.mean(0))
    return found
