"""The unembedding W by autograd and by an explicit training loop, one pair at a time, in float64.

A pair is (chosen_states, chosen_tokens, rejected_states, rejected_tokens): the hidden state that predicts each token.
"""

import torch


def reference_log_prob(weight, states, tokens):
    """Σ_t log softmax(W h_t)[y_t]."""
    total = torch.zeros((), dtype=weight.dtype)
    for state, token in zip(states, tokens, strict=True):
        total = total + torch.log_softmax(weight @ state.to(weight.dtype), 0)[token]
    return total


def reference_margin(weight, pair):
    """Log π(chosen) − log π(rejected)."""
    chosen_states, chosen_tokens, rejected_states, rejected_tokens = pair
    chosen = reference_log_prob(weight, chosen_states, chosen_tokens)
    return chosen - reference_log_prob(weight, rejected_states, rejected_tokens)


def reference_unembedding_gradient(weight, pair):
    """∇_W of the margin, shape (vocabulary, hidden), float64."""
    leaf = weight.detach().double().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference_margin(leaf, pair), leaf)
    return gradient


def reference_batches(count, *, batch_size, accumulation, epochs, seed):
    """Groups of micro-batches, one group an optimiser step, in the order of accelerate's seedable sampler."""
    steps = []
    for epoch in range(epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        micro = [order[start : start + batch_size] for start in range(0, count, batch_size)]
        steps += [micro[start : start + accumulation] for start in range(0, len(micro), accumulation)]
    return steps


def reference_schedule(peak, total, *, warmup=0, decay=True):
    """Linear warm-up, then linear decay to 0 or constant."""
    rates = []
    for step in range(total):
        if step < warmup:
            rates.append(peak * step / warmup)
        else:
            rates.append(peak * ((total - step) / (total - warmup) if decay else 1.0))
    return rates


def reference_head_run(weight, pairs, steps, rates, objective, *, row_weights, optimizer, weight_decay=0.0, clip=0.0):
    """Margins of all pairs against the start, after 0, 1, … optimiser steps; shape (steps + 1, pairs)."""
    start = weight.detach().double()
    current, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    history = [_margins(current, start, pairs)]
    for number, (micro_batches, rate) in enumerate(zip(steps, rates, strict=True), 1):
        leaf = current.clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for batch in micro_batches:
            for index in batch:
                margin = reference_margin(leaf, pairs[index]) - reference_margin(start, pairs[index])
                share = 1 / (len(batch) * len(micro_batches))
                loss = loss + share * row_weights[index] * objective.torch_value(margin)
        (gradient,) = torch.autograd.grad(loss, leaf)
        if clip and gradient.norm() > clip:
            gradient = gradient * clip / gradient.norm()
        if optimizer == "sgd":
            current = current - rate * (gradient + weight_decay * current)
        else:
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            root = (second / (1 - 0.999**number)).sqrt() + 1e-8
            current = current * (1 - rate * weight_decay) - rate * first / (1 - 0.9**number) / root
        history.append(_margins(current, start, pairs))
    return torch.tensor(history, dtype=torch.float64).numpy()


def _margins(weight, start, pairs):
    return [float(reference_margin(weight, pair) - reference_margin(start, pair)) for pair in pairs]
