"""The user's own run on frozen features: training the unembedding alone, simulated exactly.

When only the unembedding W is trained, the hidden states never change, so the whole run can be repeated on the stored
states without the model. The loop is transformers' `Trainer` itself, with the user's arguments: optimiser, schedule,
warm-up, clipping, accumulation, epochs, seed and batch order are the real ones by construction.

The states of a large data set stay on the disk: a batch's states are read when it is computed.

Most rows of W hardly matter: a token of probability ~0 neither moves margins nor is moved by SGD. With `mass` < 1 only
the rows that carry that share of the probability are trained, the others are held as a constant in the normaliser (our
own approximation, for many runs at little cost); `mass=1` trains all rows, and the run is then exact to rounding.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from foretune.dynamics.curves import observation_steps
from foretune.models.batches import Targets, num_states, targets_of
from foretune.models.encoding import EncodedPair
from foretune.models.head import Head
from foretune.objectives import Objective
from foretune.scores.log_probs import sum_by_response
from foretune.statistics.moments import RowSource

STATES_AT_ONCE = 256
PAIRS_AT_ONCE = 128
# States of at most so many numbers are kept in memory, 256 MB.
LARGEST_STATES = 2**26


class HeadProblem(NamedTuple):
    """Everything a run of the unembedding depends on.

    Attributes:
        head: the reference's output layer, restricted to the trained rows.
        states: scored hidden states, shape (states, hidden), float32 in memory or on the disk.
        pairs: what is scored on them.
        first_state: where each pair's states begin, and where the last one's end, shape (pairs + 1,).
        row_of: the trained row of each token, −1 where it has none, shape (vocabulary,); None: all rows are trained.
        rest: log Σ exp(logit) over the rows that are not trained, shape (states,); None where all are trained.
        reference: log-probabilities of chosen and rejected under the reference, shape (2, pairs).
    """

    head: Head
    states: RowSource | Tensor
    pairs: Sequence[EncodedPair]
    first_state: NDArray[np.int64]
    row_of: Tensor | None
    rest: Tensor | None
    reference: Tensor

    def block(self, members: Sequence[int]) -> "StateBlock":
        """States and targets of some pairs, on the device of the head."""
        device = self.head.weight.device
        where = np.concatenate([np.arange(*self.first_state[member : member + 2]) for member in members])
        states = self.states[where]
        states = states if isinstance(states, Tensor) else torch.from_numpy(states).float().to(device)
        targets = Targets(*(part.to(device) for part in targets_of([self.pairs[member] for member in members])))
        if self.row_of is not None:
            targets = targets._replace(token=self.row_of[targets.token])
        return StateBlock(torch.from_numpy(where).to(device), states, targets)


class StateBlock(NamedTuple):
    """The scored hidden states of some pairs.

    Attributes:
        where: index of each among all states, shape (states,).
        states: shape (states, hidden), float32.
        targets: what is scored on them, numbered within the block.
    """

    where: Tensor
    states: Tensor
    targets: Targets


class SimulatedRun(NamedTuple):
    """Margins along the run.

    Attributes:
        steps: optimiser steps at which margins were taken, shape (T,).
        margins: of the observed pairs, shape (T, observed), float64.
        learning_rates: of every step, shape (steps,).
    """

    steps: list[int]
    margins: NDArray[np.float64]
    learning_rates: list[float]


@torch.no_grad()
def head_problem(
    head: Head, states: RowSource | Tensor, pairs: Sequence[EncodedPair], *, mass: float = 1.0
) -> HeadProblem:
    """Prepare the problem, choosing the rows of W to train.

    Args:
        head: the reference's output layer, float32.
        states: scored hidden states, shape (states, hidden), pair by pair; those on the disk are left there if they are
            more than LARGEST_STATES numbers.
        pairs: all pairs, trained on or not.
        mass: probability that the trained rows carry together, averaged over the states.
    """
    first = np.concatenate([[0], np.cumsum([num_states(pair) for pair in pairs])])
    if isinstance(states, Tensor) or np.prod(states.shape) <= LARGEST_STATES:
        states = torch.as_tensor(states[: int(first[-1])]).float().to(head.weight.device)
    problem = HeadProblem(head, states, pairs, first, None, None, torch.empty(0))
    if mass < 1:
        problem = _with_fewer_rows(problem, mass)
    return problem._replace(reference=_log_probs_in_parts(problem, problem.head.weight, torch.arange(len(pairs))))


def _with_fewer_rows(problem: HeadProblem, mass: float) -> HeadProblem:
    head, device = problem.head, problem.head.weight.device
    probability = _moving_probability(problem)
    order = torch.argsort(probability, descending=True)
    carried = torch.cumsum(probability[order].double(), 0)
    enough = int(torch.searchsorted(carried, mass * carried[-1])) + 1
    scored = torch.zeros(len(probability), dtype=torch.bool, device=device)
    for block in _blocks(problem):
        scored[block.targets.token] = True
    active = torch.unique(torch.cat([order[:enough], torch.nonzero(scored)[:, 0]]))
    others = torch.ones(len(probability), dtype=torch.bool, device=device).index_fill(0, active, False)
    rest = [
        torch.logsumexp(head.logits(chunk)[:, others], -1)
        for block in _blocks(problem)
        for chunk in block.states.split(STATES_AT_ONCE)
    ]
    row_of = torch.full((len(probability),), -1, device=device)
    row_of[active] = torch.arange(len(active), device=device)
    return problem._replace(
        head=head._replace(weight=head.weight[active], bias=None if head.bias is None else head.bias[active]),
        row_of=row_of,
        rest=torch.cat(rest),
    )


def _moving_probability(problem: HeadProblem) -> Tensor:
    """Σ of the softmax over the states where it matters; shape (vocabulary,).

    Where chosen and rejected start from the same state, it cancels in the margin.
    """
    probability = torch.zeros(len(problem.head.weight), device=problem.head.weight.device)
    for block in _blocks(problem):
        count = block.states.new_zeros(len(block.states)).index_add(0, block.targets.state, block.targets.sign)
        for chunk in block.states[count != 0].split(STATES_AT_ONCE):
            probability += torch.softmax(problem.head.logits(chunk), -1).sum(0)
    if not probability.any():
        probability += torch.softmax(problem.head.logits(problem.block([0]).states[:1]), -1)[0]
    return probability


def _blocks(problem: HeadProblem) -> Iterator[StateBlock]:
    """All states in order, those of some pairs at a time."""
    for start in range(0, len(problem.pairs), PAIRS_AT_ONCE):
        yield problem.block(range(start, min(start + PAIRS_AT_ONCE, len(problem.pairs))))


def simulate_run(
    problem: HeadProblem,
    arguments: TrainingArguments,
    objective: Objective,
    *,
    train_pairs: Sequence[int] | NDArray[np.int64],
    weights: NDArray[np.float64],
    observed: Sequence[int] | NDArray[np.int64],
    observations: int,
) -> SimulatedRun:
    """Train the unembedding on frozen states with `arguments` and record margins.

    Args:
        problem: of all pairs, trained on or not.
        arguments: the run's own arguments; only reporting and saving are switched off.
        objective: the loss.
        train_pairs: indices of the training pairs, in the order of the training data set (it decides the batches).
        weights: row weights of all pairs, scaled to mean 1 over the training pairs.
        observed: indices of the pairs whose margins are recorded.
        observations: how many times margins are recorded, evenly spread, first and last step included.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = _HeadModel(problem.head)
        recorder = _Recorder(problem, model, torch.as_tensor(np.asarray(observed)), observations)
        trainer = _HeadTrainer(
            model=model,
            args=_quiet(arguments, scratch),
            train_dataset=_Rows(train_pairs),
            data_collator=lambda rows: {"pair": torch.tensor(rows)},
            callbacks=[recorder],
        )
        trainer.problem, trainer.objective = problem, objective
        trainer.weights = torch.as_tensor(weights, dtype=torch.float32)
        for callback in list(trainer.callback_handler.callbacks):
            if callback is not recorder and type(callback).__name__ in {"PrinterCallback", "ProgressCallback"}:
                trainer.remove_callback(callback)
        trainer.train()
    return SimulatedRun(recorder.steps, np.stack(recorder.margins), recorder.learning_rates)


class _HeadModel(torch.nn.Module):
    """The trained rows of W under the name they have in the real model, so that weight decay treats them alike."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(head.weight.shape[1], head.weight.shape[0], bias=False)
        self.lm_head.weight = torch.nn.Parameter(head.weight.clone())

    def forward(self) -> Tensor:
        return self.lm_head.weight


class _HeadTrainer(Trainer):
    problem: HeadProblem
    objective: Objective
    weights: Tensor
    loss_is_scaled_for_ga = False  # as in DPOTrainer: the loss is a mean over the micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ARG002
        pairs = inputs["pair"].cpu()
        with torch.autocast(self.problem.head.weight.device.type, enabled=False):
            scores = _log_probs(self.problem, model(), pairs) - self.problem.reference[:, pairs]
            losses = self.objective.torch_value(scores[0] - scores[1])
        return (self.weights[pairs].to(losses) * losses).mean()


class _Recorder(TrainerCallback):
    def __init__(self, problem: HeadProblem, model: _HeadModel, observed: Tensor, observations: int) -> None:
        self.problem, self.model, self.observed, self.observations = problem, model, observed, observations
        self.observe_at: set[int] = set()
        self.steps: list[int] = []
        self.margins: list[NDArray[np.float64]] = []
        self.learning_rates: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.observe_at = set(observation_steps(state.max_steps, self.observations))
        self.record(0)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.learning_rates.append(float(kwargs["lr_scheduler"].get_last_lr()[0]))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.observe_at:
            self.record(state.global_step)

    @torch.no_grad()
    def record(self, step: int) -> None:
        scores = _log_probs_in_parts(self.problem, self.model(), self.observed)
        scores = scores - self.problem.reference[:, self.observed]
        self.steps.append(step)
        self.margins.append((scores[0] - scores[1]).double().cpu().numpy())


class _Rows(torch.utils.data.Dataset):
    def __init__(self, pairs: Sequence[int] | NDArray[np.int64]) -> None:
        self.pairs = [int(pair) for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> int:
        return self.pairs[index]


def _quiet(arguments: TrainingArguments, scratch: str) -> TrainingArguments:
    """A copy that computes the same steps but reports, saves and evaluates nothing."""
    quiet = copy.copy(arguments)
    changes = {
        "output_dir": scratch,
        "report_to": [],
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,  # its name before transformers 5.20
        "activation_checkpointing": False,
        "remove_unused_columns": False,
        "push_to_hub": False,
        "load_best_model_at_end": False,
        "resume_from_checkpoint": None,
        "torch_compile": False,
        "fsdp": False,
        "fsdp_plugin_args": None,
        "ddp_find_unused_parameters": False,  # all of W is used, and DDP would not find it in an output that is W
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_persistent_workers": False,
    }
    for name, value in changes.items():
        setattr(quiet, name, value)
    return quiet


def _log_probs(problem: HeadProblem, weight: Tensor, pairs: Tensor) -> Tensor:
    """Log-probabilities of chosen and rejected of some pairs under W, shape (2, len(pairs))."""
    where, states, targets = problem.block(pairs.tolist())
    logits = problem.head._replace(weight=weight).logits(states)
    normaliser = torch.logsumexp(logits, -1)
    if problem.rest is not None:
        normaliser = torch.logaddexp(normaliser, problem.rest[where])
    scored = logits[targets.state, targets.token] - normaliser[targets.state]
    return torch.stack(sum_by_response(scored, targets, len(pairs)))


def _log_probs_in_parts(problem: HeadProblem, weight: Tensor, pairs: Tensor) -> Tensor:
    return torch.cat([_log_probs(problem, weight, part) for part in pairs.split(PAIRS_AT_ONCE)], dim=1)
