"""The user's own run, simulated: the real optimiser on margins that are a known function of the parameters.

Where margins follow from stored features (exactly for the unembedding alone, in first order else), the whole run can
be repeated without the model. The loop is transformers' `Trainer` itself, with the user's arguments: optimiser,
schedule, warm-up, clipping, accumulation, epochs, seed and batch order are the real ones by construction.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import Trainer, TrainerCallback, TrainingArguments

from foretune.dynamics.arguments import check_coordinatewise, in_order, quiet_copy
from foretune.dynamics.by_heart import TIMES, ByHeart, Followed, Learned
from foretune.dynamics.curves import observation_steps
from foretune.dynamics.margin_model import MarginModel, Renewal, all_margins, taken_up
from foretune.features.coordinates import Coordinates
from foretune.objectives import LossOfPairs, RankingLoss, SidedLoss, Unpaired, unpaired_order


class SimulatedRun(NamedTuple):
    """Margins along the run.

    Attributes:
        steps: optimiser steps at which margins were taken, shape (T,).
        margins: of the observed pairs, shape (T, observed), float64.
        learning_rates: of every simulated step.
        num_steps: of the whole run.
        end: the parameters after the last step.
        end_margins: those after the last step, with what is learned by heart, shape (observed,).
    """

    steps: list[int]
    margins: NDArray[np.float64]
    learning_rates: list[float]
    num_steps: int
    end: Mapping[str, Tensor] = {}
    end_margins: NDArray[np.float64] = np.empty(0)

    def after(self, past: "SimulatedRun") -> "SimulatedRun":
        """This run with what came before its first step."""
        earlier = [place for place, step in enumerate(past.steps) if step < self.steps[0]]
        return self._replace(
            steps=[past.steps[place] for place in earlier] + self.steps,
            margins=np.concatenate([past.margins[earlier], self.margins]),
            learning_rates=past.learning_rates + self.learning_rates,
        )


def simulate_run(
    problem: MarginModel,
    arguments: TrainingArguments,
    objective: LossOfPairs,
    *,
    train_pairs: Sequence[int] | NDArray[np.int64],
    weights: NDArray[np.float64],
    observed: Sequence[int] | NDArray[np.int64],
    observations: int,
    factors: NDArray[np.float64] | None = None,
    offsets: NDArray[np.float64] | None = None,
    checkpoint: Path | None = None,
    renewal: Renewal | None = None,
    by_heart: ByHeart | None = None,
) -> SimulatedRun:
    """Train with `arguments` on the margins of `problem` and record them.

    Args:
        problem: margins of all pairs that are trained on or observed.
        arguments: the run's own arguments; only reporting and saving are switched off.
        objective: the loss; of rankings, whose contrasts pairs of `problem` are, a row of a batch is a ranking; a sided
            one also asks `problem` for the chosen scores; where it is unpaired, batches are of twice as many rows.
        train_pairs: which pair of `problem` each row of the training data set is (its order decides the batches).
        weights: row weights, scaled to mean 1, of the same rows.
        observed: indices of the pairs whose margins are recorded.
        observations: how many times margins are recorded, evenly spread, first and last step included.
        factors: what the margin of each row is multiplied by before the loss sees it (−1: its labels are flipped).
        offsets: what is then added to it (the reference's own margin, for a loss that knows no reference).
        checkpoint: where the real run was stopped that this one goes on from: its optimiser, schedule, place in the
            data and generators are taken over; `problem` starts at its parameters.
        renewal: asked after every step for margins around another anchor (see `taken_up`), before they are recorded.
        by_heart: takes off, for the loss and for the record, what measured pairs learn that stand for others.

    Raises:
        UserError: an optimiser that mixes coordinates, where not all of them are there.
    """
    if problem.sampled:
        check_coordinatewise(arguments)
    ranked = objective.within(np.asarray(train_pairs)) if isinstance(objective, RankingLoss) else None
    order = np.arange(len(train_pairs) if ranked is None else len(ranked.contrasts.members))
    if isinstance(objective, SidedLoss) and objective.unpaired:
        order = unpaired_order(2 * len(train_pairs), arguments)
        arguments = in_order(arguments)
        arguments.per_device_train_batch_size *= 2
    with tempfile.TemporaryDirectory() as scratch:
        model = _Parameters(problem.start())
        recorder = _Recorder(
            problem,
            model,
            np.asarray(observed),
            observations,
            renewal,
            _followed(by_heart, problem, np.asarray(observed), isinstance(objective, SidedLoss)),
        )
        trainer = _Trainer(
            model=model,
            args=quiet_copy(arguments, scratch),
            train_dataset=_Rows(order),
            data_collator=lambda rows: {"row": torch.tensor(rows)},
            callbacks=[recorder],
        )
        trainer.recorder, trainer.objective = recorder, objective if ranked is None else ranked
        trainer.pairs = torch.as_tensor(np.asarray(train_pairs))
        trainer.weights = torch.as_tensor(weights, dtype=torch.float32)
        trainer.factors = torch.as_tensor(np.ones(len(train_pairs)) if factors is None else factors).float()
        trainer.offsets = torch.as_tensor(np.zeros(len(train_pairs)) if offsets is None else offsets).float()
        for callback in list(trainer.callback_handler.callbacks):
            if callback is not recorder and type(callback).__name__ in {"PrinterCallback", "ProgressCallback"}:
                trainer.remove_callback(callback)
        # a search for garbage among all objects of the process takes longer than a short run
        trainer.accelerator.free_memory = lambda *objects: list(objects)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    margins, rates = np.stack(recorder.margins), recorder.learning_rates
    found = SimulatedRun(recorder.steps, margins, rates, trainer.state.max_steps, model.end(), recorder.end_margins)
    # trainers and optimizers refer to themselves, and so stay until garbage is searched for: nothing large with them
    trainer.optimizer.state.clear()  # pyright: ignore
    vars(recorder).clear()
    return found


class _Parameters(torch.nn.Module):
    """The parameters under the names they have in the real model, so that weight decay treats them alike."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.by_name: dict[str, torch.nn.Parameter] = {}
        for name, value in start.items():
            *path, own = name.split(".")
            owner: torch.nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            self.by_name[name] = torch.nn.Parameter(value.detach().clone())
            owner.register_parameter(own, self.by_name[name])

    def forward(self) -> Mapping[str, Tensor]:
        """What several processes share gradients of; accelerate looks through every tensor that it returns."""
        return self.by_name

    def end(self) -> dict[str, Tensor]:
        """The parameters, which are not here any more."""
        found = {name: parameter.detach() for name, parameter in self.by_name.items()}
        for parameter in self.by_name.values():
            parameter.data, parameter.grad = parameter.data.new_empty(0), None
        return found

    # The trainer asks for these at every step; walking through hundreds of modules would take longer than the step.

    def train(self, mode: bool = True) -> "_Parameters":
        self.training = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.by_name.values():
            parameter.grad = None if set_to_none else torch.zeros_like(parameter)

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:  # noqa: ARG002
        return iter(self.by_name.values())


class _Trainer(Trainer):
    recorder: "_Recorder"
    objective: LossOfPairs
    pairs: Tensor
    weights: Tensor
    factors: Tensor
    offsets: Tensor
    loss_is_scaled_for_ga = False  # as in DPOTrainer: the loss is a mean over the micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ARG002
        rows = inputs["row"].cpu()
        if isinstance(self.objective, RankingLoss):
            return self._loss_of_rankings(model, self.objective, rows)
        with torch.autocast(self.args.device.type, enabled=False):
            if isinstance(self.objective, SidedLoss) and self.objective.unpaired:
                rows, losses = rows // 2, self._of_single(model, self.objective, rows)
            elif isinstance(self.objective, SidedLoss):
                losses = self.objective.objective.torch_value(*self._sides(model, self.objective, rows))
            else:
                losses = self.objective.torch_value(self._seen(model, rows))
        return (self.weights[rows].to(losses) * losses).mean()

    def _loss_of_rankings(self, model, loss, rows):
        members = torch.from_numpy(loss.contrasts.members)[rows]
        ranks = torch.from_numpy(loss.contrasts.ranks)[rows]
        there = pad(members >= 0, (0, 1))
        with torch.autocast(self.args.device.type, enabled=False):
            seen = self._seen(model, members[members >= 0])
            scores = seen.new_zeros(ranks.shape).masked_scatter(there.to(seen.device), seen)
            losses = loss.objective.torch_value(scores, ranks.to(seen.device))
        return (self.weights[members[:, 0]].to(losses) * losses).mean()

    def _seen(self, model, rows):
        """What the loss sees of some rows' margins."""
        margins = self._margins(model, self.pairs[rows])
        return self.factors[rows].to(margins) * margins + self.offsets[rows].to(margins)

    def _margins(self, model, pairs):
        parameters = self.recorder.model.by_name if model is self.recorder.model else model()
        return self.recorder.without(self.recorder.problem.margins(parameters, pairs, training=True), pairs)

    def _sides(self, model, loss, rows):
        """Chosen and rejected scores of some rows, exchanged where labels are flipped."""
        both = torch.from_numpy(loss.both(self.pairs[rows].numpy()))
        margin, chosen = self._margins(model, both).chunk(2)
        flipped, rejected = (self.factors[rows] < 0).to(chosen.device), chosen - margin
        return torch.where(flipped, rejected, chosen), torch.where(flipped, chosen, rejected)

    def _of_single(self, model, loss, responses):
        """Losses of rows of one response each."""
        chosen, rejected = self._sides(model, loss, responses // 2)
        desirable = (responses % 2 == 0).to(chosen.device)
        return Unpaired(loss.objective).torch_value(torch.where(desirable, chosen, rejected), desirable)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The parameters are those of the checkpoint already."""

    def get_decay_parameter_names(self, model):
        """The real model's, whose layers' types decide as well as their names."""
        decayed = self.recorder.problem.decayed
        return super().get_decay_parameter_names(model) if decayed is None else list(decayed)

    def create_optimizer(self, model=None):
        """The real one, which takes from a checkpoint the state of the coordinates that are there."""
        optimizer = super().create_optimizer(model)
        optimizer.register_load_state_dict_pre_hook(self._state_of_sample)
        return optimizer

    def _state_of_sample(self, optimizer, state_dict):
        sampled = self.recorder.problem.sampled
        names = {parameter: name for name, parameter in self.recorder.model.named_parameters()}
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {key: _coordinates_of(value, sampled.get(order[index])) for key, value in own.items()}
            for index, own in state_dict["state"].items()
        }
        return state_dict | {"state": state}

    def _clip_grad_norm(self, model):
        """The norm of the whole gradient, estimated where coordinates are sampled."""
        sampled = self.recorder.problem.sampled
        if not sampled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        gradients = {name: own.grad for name, own in self.recorder.model.named_parameters() if own.grad is not None}
        squares = [
            (gradient.square() * (sampled[name].weight if name in sampled else 1.0)).sum()
            for name, gradient in gradients.items()
        ]
        norm = torch.stack(squares).sum().sqrt()
        for gradient in gradients.values():
            gradient.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _coordinates_of(value: Any, coordinates: Coordinates | None) -> Any:
    """The sampled part of what an optimiser keeps for each coordinate; what it keeps for a parameter, as it is."""
    if coordinates is None or not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    return value.flatten()[coordinates.index.to(value.device)]


def _followed(
    by_heart: ByHeart | None, problem: MarginModel, observed: NDArray[np.int64], sided: bool
) -> list[Followed]:
    """Of margins, and of chosen scores, which can be recorded while the loss sees margins alone."""
    if by_heart is None:
        return []
    number = len(by_heart.owner)
    both = sided or observed.max() >= number
    return [Followed(by_heart, problem, problem.start(), first) for first in ((0, number) if both else (0,))]


class _Recorder(TrainerCallback):
    def __init__(
        self,
        problem: MarginModel,
        model: _Parameters,
        observed: NDArray[np.int64],
        observations: int,
        renewal: Renewal | None,
        by_heart: Sequence[Followed],
    ) -> None:
        self.problem, self.model, self.observed, self.observations = problem, model, observed, observations
        self.renewal, self.by_heart = renewal, by_heart
        self.shift: Tensor | None = None
        self.untold: dict[int, list[Learned]] = {}
        self.observe_at: set[int] = set()
        self.shift_at: set[int] = set()
        self.steps: list[int] = []
        self.margins: list[NDArray[np.float64]] = []
        self.end_margins = np.empty(0)
        self.learning_rates: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.observe_at = set(observation_steps(state.max_steps, self.observations))
        self.shift_at = set(observation_steps(state.max_steps, TIMES)) if self.by_heart else set()
        self._record(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.learning_rates.append(float(kwargs["lr_scheduler"].get_last_lr()[0]))

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            if self.renewal is not None and state.global_step < state.max_steps:
                renewed = self.renewal(state.global_step, self.model.by_name)
                if renewed is not None:
                    for own in self.by_heart:
                        own.anchor(renewed, self.model.by_name)
                    self._tell()
                    self.problem = taken_up(renewed, self.problem, self.model.by_name)
        if state.global_step in self.shift_at:
            shift = self._shift(self._learned())
            self.shift = None if shift is None else torch.from_numpy(shift)
        if state.global_step in self.observe_at:
            self._record(state.global_step)

    def _record(self, step: int) -> None:
        self.steps.append(step)
        self.end_margins = all_margins(self.problem, self.model.by_name, self.observed).double().cpu().numpy()
        self.margins.append(self.end_margins)
        self.untold[len(self.steps) - 1] = self._learned()
        self._tell()

    def _tell(self) -> None:
        """Take off recorded margins what is learned by heart, as soon as that is known."""
        for place, learned in [*self.untold.items()]:
            shift = self._shift(learned)
            if shift is not None:
                self.margins[place] = self.margins[place] - shift[self.observed]
                del self.untold[place]

    def without(self, margins: Tensor, pairs: Tensor) -> Tensor:
        """Margins of some pairs as the loss should see them."""
        return margins if self.shift is None else margins - self.shift[pairs].to(margins)

    def _learned(self) -> list[Learned]:
        return [own.learned(self.problem, self.model.by_name) for own in self.by_heart]

    def _shift(self, learned: Sequence[Learned]) -> NDArray[np.float64] | None:
        """What to take off every margin, and every chosen score."""
        found = [own.shift(part) for own, part in zip(self.by_heart, learned, strict=True)]
        known = [shift for shift in found if shift is not None]
        return np.concatenate(known) if known else None


class _Rows(torch.utils.data.Dataset):
    """Row numbers; a row is looked up when its loss is computed."""

    def __init__(self, order: NDArray[np.int64]) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> int:
        return int(self._order[index])
