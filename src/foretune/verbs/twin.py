"""The linearised twin of a job's run: where its features are taken, and what simulates it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import set_seed

from foretune import processes
from foretune.dynamics.anchors import Anchors, Known, anchor_store, read_anchor
from foretune.dynamics.by_heart import ByHeart
from foretune.dynamics.margin_model import Anchored, Looked
from foretune.dynamics.relinearise import FEWEST_PAIRS
from foretune.features.pair_gradients import trainable_names
from foretune.features.token_factors import AdaptedLayer
from foretune.models.encoding import EncodedPair
from foretune.models.load import load_model
from foretune.objectives import SidedObjective
from foretune.records.provenance import sha256_of
from foretune.scores.log_probs import divided_scores
from foretune.training.build import lora_config, prepare_trainable
from foretune.verbs.audit import features_key, features_of, reference_margins, reference_scores
from foretune.verbs.forms import TangentForm, WeightSpaceForm, form_of
from foretune.verbs.prepare import Prepared, load_reference
from foretune.verbs.progress import Progress
from foretune.verbs.stand_ins import stand_ins


class Lineariser:
    """Takes the features of some pairs at any parameters of the model that the run will train.

    Args:
        prepared: the job, audited.
        progress: where bars are shown.
        folder: where features are kept.

    Attributes:
        sided: features are taken of the chosen responses' scores as well as of the margins (see `MarginModel`).
        measured: the pairs that features are taken of, shape (m,).
        place: the measured pair that each pair is, or that stands for it: one of its behaviour and preferred answer;
            sided, then m more than that of its chosen score.
        keys: of the features that were taken, by step.
        looked: training pairs without features that are scored wherever features are taken.
        num_looked: how many pairs were scored at simulated weights.
    """

    def __init__(self, prepared: Prepared, progress: Progress, folder: Path) -> None:
        """Make the model as the trainer will make it; no features are taken yet."""
        self._prepared, self._progress, self._folder = prepared, progress, folder
        self.sided = isinstance(prepared.objective, SidedObjective)
        self.measured = measured_pairs(prepared)
        scored = prepared.job.convention.scored(prepared.pairs)
        self.place = self.stand_ins()
        self.looked = self._looked_at()
        sides = self.measured, prepared.observed, self.looked
        self._pairs, self._observed, self._beside = (_Some(scored, own, self.sided) for own in sides)
        self._model = trained_model(prepared)
        self._form = form_of(prepared.job, self._model, self._pairs, packed=self._packed)
        self._start = {}
        if self._model is prepared.loaded.model:
            names = trainable_names(self._model)
            self._start = {name: self._model.get_parameter(name).detach().clone() for name in names}
        self.keys: dict[int, str] = {}
        references = reference_scores if self.sided else reference_margins
        reference = references(prepared, features_of(prepared, progress))
        self._reference, self._observed_reference, self._beside_reference = (
            reference[..., own].reshape(-1) for own in sides
        )
        self.num_looked = 0

    @property
    def num_measured(self) -> int:
        """Rows of features."""
        return len(self._pairs)

    def stand_ins(self, draw: np.random.Generator | None = None) -> NDArray[np.int64]:
        """`place`, or another one."""
        place = stand_ins(self._prepared, self.measured, draw)
        return np.concatenate([place, place + len(self.measured)]) if self.sided else place

    def _looked_at(self) -> NDArray[np.int64]:
        """Training pairs without features, where weights go on and no held-out pairs tell what is by heart.

        As many as are measured, if so many are observed; a few even if none is.
        """
        prepared, place = self._prepared, self.place[: len(self._prepared.pairs)]
        is_train = prepared.split_of == "train"
        heart = ByHeart.of(place, prepared.train_pairs, prepared.observed, prepared.behaviour_of, is_train)
        if heart is not None or not prepared.several_passes:
            return np.empty(0, dtype=np.int64)
        as_many_more, few_more = (
            prepared.representatives(prepared.twin_pairs + more, split="train")
            for more in (prepared.twin_pairs, min(prepared.twin_pairs, FEWEST_PAIRS))
        )
        few_more = np.intersect1d(few_more, prepared.audited_places)  # the reference's scores are known of these
        return np.setdiff1d(np.union1d(np.intersect1d(prepared.observed, as_many_more), few_more), self.measured)

    @property
    def _packed(self) -> bool:
        return bool(self._prepared.job.run.record["audit"]["probes"]["packed"])

    @property
    def renewable(self) -> bool:
        """Whether features can be taken at simulated weights: not where but a sample of their coordinates is known."""
        return not (isinstance(self._form, TangentForm) and self._form.sampled)

    @property
    def anchors(self) -> Anchors:
        """All features that were taken so far."""
        return Anchors(self._folder, self.keys, self._model.device)

    def load(self, checkpoint: Path) -> None:
        """Give the model what a checkpoint of the run holds."""
        if self._prepared.job.trainable == "lora":
            set_peft_model_state_dict(self._model, load_peft_weights(str(checkpoint)))
            return
        dtype = next(self._model.parameters()).dtype
        if dtype != self._prepared.job.dtype():  # trained in another precision than the audit's
            found = map(self._margins, (self._pairs, self._observed, self._beside))
            self._reference, self._observed_reference, self._beside_reference = found
        self._model.load_state_dict(load_model(str(checkpoint), dtype=dtype).model.state_dict())

    def at(self, step: int, parameters: Mapping[str, Tensor] | None = None) -> Anchored:
        """Margins in first order around `parameters` (None: those that training starts from).

        Args:
            step: after which the run has these parameters; the shards are called so.
            parameters: of all that is trained, by name.
        """
        self._set(parameters or {})
        key = sha256_of(
            features_key(self._prepared),
            self.measured.tolist(),
            self.sided,
            self._prepared.job.convention,
            type(self._form).__name__,
            *self._form.settings,
            scalings(self._model),
            *((name, value.shape, value.cpu().numpy().tobytes()) for name, value in self._form.parameters().items()),
        )
        store = anchor_store(self._folder, step, key)
        with self._progress.bar(f"features after step {step}", self.num_measured) as advance:
            margin = self._form.measure(self._pairs, store, packed=self._packed, progress=advance)
        if step == 0:
            self._reference = margin  # nothing has changed yet; another pass would round differently
        found = self._margins(self._beside) - self._beside_reference if step else np.zeros(len(self._beside))
        self.num_looked += len(self._beside) if step else 0
        known = Known(margin - self._reference, self.place, Looked(self.looked, found))
        processes.on_main(lambda: self._form.write(store, known))
        self.keys[step] = key
        return read_anchor(store, self._model.device)

    def look(self, parameters: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """Margins of the observed pairs (sided: and their chosen scores) under the model with these parameters."""
        self._set(parameters)
        self.num_looked += len(self._observed)
        with self._progress.bar("look at the end of the simulated run", len(self._observed)) as advance:
            found = self._margins(self._observed)
            advance(len(self._observed))
        return found - self._observed_reference

    def drawn_anew(self, seed: int) -> dict[str, Tensor]:
        """The matrices A by name that training would start from with another seed."""
        return drawn_anew(self._model, self._form.layers, seed) if isinstance(self._form, WeightSpaceForm) else {}

    def _margins(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float64]:
        """Under the model as it is, shape (len(pairs),); several processes divide them."""
        if not len(pairs):
            return np.empty(0)
        chosen, rejected = divided_scores(self._model, pairs, packed=self._packed)
        return chosen - rejected

    def leave(self) -> None:
        """Give somebody's model its parameters back."""
        self._set(self._start)

    def _set(self, parameters: Mapping[str, Tensor]) -> None:
        for name, value in parameters.items():
            self._model.get_parameter(name).data.copy_(value)


def trained_model(prepared: Prepared) -> torch.nn.Module:
    """The model as `build_trainer` makes it before the first step: adapters are drawn from the same seed."""
    job = prepared.job
    if not job.replayable:  # somebody's trainer has it
        return prepared.loaded.model
    model = load_reference(job, to_train=True).model
    prepare_trainable(model, job.trainable)
    if job.trainable != "lora":
        return model
    set_seed(job.training.seed)
    return get_peft_model(model, lora_config(job.model, model))


def drawn_anew(model: torch.nn.Module, layers: Sequence[AdaptedLayer], seed: int) -> dict[str, Tensor]:
    """The matrices A by name, float32, as PEFT draws them, where a draw decides them; the model keeps its own."""
    before = {name: model.get_parameter(name).detach().clone() for own in layers for name in (own.a, own.b)}
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawn = {layer.a: a for layer in layers if (a := _drawn(model, layer)) is not None}
    for name, value in before.items():
        model.get_parameter(name).data.copy_(value)
    return drawn


def _drawn(model: torch.nn.Module, layer: AdaptedLayer) -> Tensor | None:
    module: LoraLayer = model.get_submodule(layer.name)  # pyright: ignore
    adapter = module.active_adapters[0]
    how = getattr(getattr(model, "peft_config", {}).get(adapter), "init_lora_weights", None)
    if how is not True and str(how).lower() != "gaussian":  # PEFT's other ways start from the layer's own weights
        return None
    module.reset_lora_parameters(adapter, how)
    return model.get_parameter(layer.a).detach().float().clone()


def scalings(model: torch.nn.Module) -> list[tuple[str, dict[str, float]]]:
    """What adapters are multiplied by, layer by layer: no parameter holds it."""
    found = ((name, getattr(module, "scaling", None)) for name, module in model.named_modules())
    return [(name, scaling) for name, scaling in found if isinstance(scaling, dict)]


def measured_pairs(prepared: Prepared) -> NDArray[np.int64]:
    """The pairs that features are taken of: `twin_pairs` of each behaviour, and all observed ones or as many held out.

    Observed pairs of whom there are no features are looked at in the end, if weights follow features of the way.
    """
    held = prepared.representatives(min(prepared.twin_pairs, prepared.observe_pairs), split="test")
    observed = held if prepared.several_passes else prepared.observed
    return np.union1d(observed, prepared.representatives(prepared.twin_pairs, split="train"))


class _Some(Sequence[EncodedPair]):
    """Some of all pairs, read when they are asked for; sided, then their chosen responses over empty ones."""

    def __init__(self, pairs: Sequence[EncodedPair], members: NDArray[np.int64], sided: bool) -> None:
        self._pairs, self._members, self._sided = pairs, members, sided

    def __len__(self) -> int:
        return len(self._members) * (1 + self._sided)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        alone, place = divmod(range(len(self))[index], len(self._members))
        pair = self._pairs[int(self._members[place])]
        return pair._replace(rejected_ids=[]) if alone else pair
