"""The user's own run on frozen features: training the unembedding alone, simulated exactly.

When only the unembedding W is trained, the hidden states never change, so the whole run can be repeated on the stored
states without the model. The loop is transformers' `Trainer` itself, with the user's arguments: optimiser, schedule,
warm-up, clipping, accumulation, epochs, seed and batch order are the real ones by construction.

Most rows of W hardly matter: a token of probability ~0 neither moves margins nor is moved by SGD. With `mass` < 1 only
the rows that carry that share of the probability are trained, the others are held as a constant in the normaliser (our
own approximation, for many runs at little cost); `mass=1` trains all rows, and the run is then exact to rounding.
"""

import copy
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from foretune.dynamics.curves import observation_steps
from foretune.models.batches import Targets
from foretune.models.head import Head
from foretune.objectives import Objective
from foretune.scores.log_probs import sum_by_response

STATES_AT_ONCE = 256


class HeadProblem(NamedTuple):
    """Everything a run of the unembedding depends on.

    Attributes:
        head: the reference's output layer, restricted to the trained rows.
        states: scored hidden states, float32, shape (states, hidden).
        targets: scored tokens, as indices into the trained rows.
        rest: log Σ exp(logit) over the rows that are not trained, shape (states,); None where all are trained.
        reference: log-probabilities of chosen and rejected under the reference, shape (2, pairs).
        first_target: where each pair's targets begin, and where the last one's end.
    """

    head: Head
    states: Tensor
    targets: Targets
    rest: Tensor | None
    reference: Tensor
    first_target: list[int]


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
def head_problem(head: Head, states: Tensor, targets: Targets, num_pairs: int, *, mass: float = 1.0) -> HeadProblem:
    """Prepare the problem, choosing the rows of W to train.

    Args:
        head: the reference's output layer, float32.
        states: scored hidden states, shape (states, hidden).
        targets: scored tokens; grouped by pair, in the order of pairs.
        num_pairs: number of pairs.
        mass: probability that the trained rows carry together, averaged over the states.
    """
    device = head.weight.device
    first_target = torch.searchsorted(targets.pair.contiguous(), torch.arange(num_pairs + 1)).tolist()
    targets = Targets(*(part.to(device) for part in targets))
    problem = HeadProblem(head, states.float().to(device), targets, None, torch.empty(0), first_target)
    if mass < 1:
        problem = _with_fewer_rows(problem, mass)
    pairs = torch.arange(num_pairs)
    return problem._replace(reference=_log_probs_in_parts(problem, problem.head.weight, pairs))


def _with_fewer_rows(problem: HeadProblem, mass: float) -> HeadProblem:
    head, states, targets = problem.head, problem.states, problem.targets
    device = head.weight.device
    probability = torch.zeros(len(head.weight), device=device)
    for chunk in _moving_states(problem).split(STATES_AT_ONCE):
        probability += torch.softmax(head.logits(chunk), -1).sum(0)
    order = torch.argsort(probability, descending=True)
    carried = torch.cumsum(probability[order].double(), 0)
    enough = int(torch.searchsorted(carried, mass * carried[-1])) + 1
    active = torch.unique(torch.cat([order[:enough], targets.token]))
    others = torch.ones(len(probability), dtype=torch.bool, device=device).index_fill(0, active, False)
    rest = [torch.logsumexp(head.logits(chunk)[:, others], -1) for chunk in states.split(STATES_AT_ONCE)]
    renumbered = torch.full((len(probability),), -1, device=device)
    renumbered[active] = torch.arange(len(active), device=device)
    return problem._replace(
        head=head._replace(weight=head.weight[active], bias=None if head.bias is None else head.bias[active]),
        targets=targets._replace(token=renumbered[targets.token]),
        rest=torch.cat(rest),
    )


def _moving_states(problem: HeadProblem) -> Tensor:
    """States whose softmax matters: where chosen and rejected start from the same state, it cancels in the margin."""
    count = problem.states.new_zeros(len(problem.states)).index_add(0, problem.targets.state, problem.targets.sign)
    moving = problem.states[count != 0]
    return moving if len(moving) else problem.states[:1]


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
        with torch.autocast(self.problem.states.device.type, enabled=False):
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
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_persistent_workers": False,
    }
    for name, value in changes.items():
        setattr(quiet, name, value)
    return quiet


def _log_probs(problem: HeadProblem, weight: Tensor, pairs: Tensor) -> Tensor:
    """Log-probabilities of chosen and rejected of some pairs under W, shape (2, len(pairs))."""
    device, first = problem.states.device, problem.first_target
    members = [range(first[pair], first[pair + 1]) for pair in pairs.tolist()]
    chosen = torch.tensor([target for member in members for target in member], device=device)
    owner = torch.tensor([number for number, member in enumerate(members) for _ in member], device=device)
    wanted, state = torch.unique(problem.targets.state[chosen], return_inverse=True)
    states = problem.states[wanted]
    logits = problem.head._replace(weight=weight).logits(states)
    normaliser = torch.logsumexp(logits, -1)
    if problem.rest is not None:
        normaliser = torch.logaddexp(normaliser, problem.rest[wanted])
    token = problem.targets.token[chosen]
    scored = logits[state, token] - normaliser[state]
    targets = Targets(state, token, owner, problem.targets.sign[chosen])
    return torch.stack(sum_by_response(scored, targets, len(pairs)))


def _log_probs_in_parts(problem: HeadProblem, weight: Tensor, pairs: Tensor) -> Tensor:
    return torch.cat([_log_probs(problem, weight, part) for part in pairs.split(128)], dim=1)
