"""Features of the unembedding W in closed form, no backward pass: ∇_W log π(y|x) = Σ_t (e_{y_t} − p_t) h_tᵀ.

One forward pass over the pairs yields what everything later is computed from:

- the final hidden states that predict response tokens (the only thing a run that trains W alone depends on),
- the reference log-probabilities,
- a sketch of each pair's feature φ = ∇_W margin (theory T13).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretune.features.blocks import block_bounds, measure_blocks
from foretune.features.sketch import TensorSketch
from foretune.features.store import ShardColumn, ShardStore
from foretune.models.batches import Targets, num_states, targets_of
from foretune.models.dtype import float32_products_of
from foretune.models.encoding import EncodedPair
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import Head, head_of
from foretune.scores.log_probs import states_at_once, sum_by_response

PAIRS_PER_SHARD = 256
# States whose count sketches and spectra exist at any one time; on a CPU they stay in its cache.
SKETCHED_AT_ONCE = {"cpu": 128}
SKETCHED_AT_ONCE_OF_OTHERS = 2**14


class PairFeatures(NamedTuple):
    """What one pass measured, rows in the order of the pairs given. Columns are on the disk until rows are asked for.

    Attributes:
        chosen_logp: reference log-probabilities of the chosen responses, float64, shape (n,).
        rejected_logp: those of the rejected responses.
        first_state: the final hidden state at the last prompt token, shape (n, hidden).
        chosen_mean: mean final hidden state over the chosen response's tokens, shape (n, hidden).
        rejected_mean: the same of the rejected response.
        sketch: φ, shape (n, sketch_dim); inner products estimate those of ∇_W margin.
    """

    chosen_logp: NDArray[np.float64]
    rejected_logp: NDArray[np.float64]
    first_state: ShardColumn
    chosen_mean: ShardColumn
    rejected_mean: ShardColumn
    sketch: ShardColumn


def measure_pairs(
    model: torch.nn.Module,
    pairs: Sequence[EncodedPair],
    store: ShardStore,
    *,
    sketch_dim: int = 4096,
    packed: bool = True,
    progress: Callable[[int], None] = lambda pairs_done: None,
) -> None:
    """Run the pass, or what is missing of it, divided over the processes; `read_features` gives its results.

    Args:
        model: the reference model.
        pairs: all pairs; blocks of 256 of them make a shard.
        store: where shards go; those already there under the same key are not computed again.
        sketch_dim: length of φ's sketch.
        packed: compute each prompt once (see `foretune.models.batches`).
        progress: called with the number of pairs that all processes have finished so far, about.
    """
    head, forward = head_of(model), ForwardPass(model, packed=packed)
    sketch = TensorSketch(*head.weight.shape, dim=sketch_dim, device=str(head.weight.device))
    head = head.reordered(sketch.order)
    measure_blocks(
        model,
        pairs,
        store,
        lambda block: _measure_block(forward, head, sketch, block),
        block=PAIRS_PER_SHARD,
        progress=progress,
    )


def read_features(store: ShardStore, num_pairs: int) -> PairFeatures:
    """The results of a finished pass.

    Raises:
        UserError: a shard is missing or damaged.
    """
    bounds = block_bounds(num_pairs, PAIRS_PER_SHARD)
    columns = {name: ShardColumn(store, name, bounds) for name in PairFeatures._fields}
    for name in ("chosen_logp", "rejected_logp"):
        columns[name] = columns[name][:].astype(np.float64)  # pyright: ignore
    return PairFeatures(**columns)  # pyright: ignore


def read_states(store: ShardStore, num_states: NDArray[np.int64]) -> ShardColumn:
    """All scored states of a finished pass, pair by pair; `num_states` says how many each pair has, shape (n,)."""
    first = np.concatenate([[0], np.cumsum(num_states)])
    return ShardColumn(store, "states", first[block_bounds(len(num_states), PAIRS_PER_SHARD)])


def open_store(run_folder: Path, key: str) -> ShardStore:
    """The feature shards of a run folder."""
    return ShardStore(run_folder / "features", key)


@torch.no_grad()
def _measure_block(
    forward: ForwardPass, head: Head, sketch: TensorSketch, pairs: Sequence[EncodedPair]
) -> dict[str, Tensor]:
    states = forward.states(pairs)
    targets = Targets(*(part.to(states.device) for part in targets_of(pairs)))
    owner = _owner_of_states(pairs).to(states.device)
    with float32_products_of(head.numbers):
        sketches, log_probs = _sketched(head, sketch, states, targets, owner)
    scores = sum_by_response(log_probs, targets, len(pairs))
    chosen_mean, rejected_mean = _response_means(states.float(), pairs)
    return {
        "states": states,
        "chosen_logp": scores.chosen,
        "rejected_logp": scores.rejected,
        "first_state": states[first_states(pairs)],
        "chosen_mean": chosen_mean,
        "rejected_mean": rejected_mean,
        "sketch": sketches,
    }


def _sketched(
    head: Head, sketch: TensorSketch, states: Tensor, targets: Targets, owner: Tensor
) -> tuple[Tensor, Tensor]:
    """Sketches of each pair's Σ r hᵀ, residuals r = Σ ±(e_y − p), and the log-probability of each target.

    Some states at a time: neither residuals nor their count sketches of all states are ever there. The head's
    vocabulary is in the sketch's order. At the state that both responses start from, p cancels: chosen and rejected
    are scored on the same softmax.
    """
    places = sketch.place[targets.token]
    token_logits = head.token_logits(states[targets.state], places)
    values = targets.sign * head.slope(token_logits)
    softmax_count = states.new_zeros(len(states), dtype=torch.float32).index_add(0, targets.state, targets.sign)
    normaliser = torch.empty(len(states), device=states.device)
    spectra = sketch.spectra(int(owner[-1]) + 1)
    step = min(states_at_once(head), SKETCHED_AT_ONCE.get(states.device.type, SKETCHED_AT_ONCE_OF_OTHERS))
    for start in range(0, len(states), step):
        chunk = slice(start, start + step)
        logits = head.logits(states[chunk])
        factor = None if head.softcap is None else head.slope(logits)
        largest = logits.amax(-1, keepdim=True)
        powers = logits.sub_(largest).exp_()
        total = powers.sum(-1, keepdim=True)
        normaliser[chunk] = (largest + total.log())[:, 0]
        residuals = powers.mul_(-softmax_count[chunk, None] / total).mul_(head.scale if factor is None else factor)
        here = (targets.state >= start) & (targets.state < start + step)
        residuals.index_put_((targets.state[here] - start, places[here]), values[here], accumulate=True)
        sketch.add_products(spectra, sketch.rows(residuals), states[chunk].float(), owner[chunk])
    return sketch.of_spectra(spectra), token_logits - normaliser[targets.state]


def first_states(pairs: Sequence[EncodedPair]) -> list[int]:
    """Which of the states of `pairs` are those at the last prompt tokens, one a pair."""
    offsets = np.cumsum([0, *(num_states(pair) for pair in pairs)])
    return offsets[:-1].tolist()


def _owner_of_states(pairs: Sequence[EncodedPair]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([num_states(pair) for pair in pairs]))


def _response_means(states: Tensor, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    """Mean state after reading each response token but the last (the end token); one-token answers: the first state."""
    means: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start, pair in zip(first_states(pairs), pairs, strict=True):
        middle = start + 1 + max(len(pair.chosen_ids) - 1, 0)
        stop = start + num_states(pair)
        for collected, begin, end in ((means[0], start + 1, middle), (means[1], middle, stop)):
            collected.append(states[begin:end].mean(0) if end > begin else states[start])
    return torch.stack(means[0]), torch.stack(means[1])
