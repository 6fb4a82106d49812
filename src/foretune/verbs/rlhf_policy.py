"""What a policy is worth on fixed prompts: proxy and held-out reward and KL, and how they will grow."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from foretune.dynamics.policy_gradient import first_order, output_layer_flow, policy_problem
from foretune.features.store import ShardStore
from foretune.features.unembedding import measure_pairs, read_features
from foretune.models.batches import supports_packing
from foretune.models.encoding import EncodedPair
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import head_of
from foretune.models.load import LoadedModel
from foretune.models.reward import FrozenReward, answered
from foretune.models.sampling import draw_pairs
from foretune.scores import pair_scores

FloatArray = NDArray[np.float64]
SKETCH = 4096


class Prompt(NamedTuple):
    """A prompt that answers are drawn to.

    Attributes:
        text: as the data have it: text, or messages.
        ids: its tokens.
        behaviour: its behaviour.
        split: train or test.
    """

    text: object
    ids: list[int]
    behaviour: str
    split: str


class Judges(NamedTuple):
    """The rewards: the first is maximised, the second only measured (or is the first again)."""

    models: Sequence[FrozenReward]
    end: int

    def table(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> FloatArray:
        """Rewards of completions by the maximised and the measured judge, shape (2, n)."""
        return np.stack([self.rewards(place, prompts, completions) for place in (0, -1)])

    def rewards(self, place: int, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> FloatArray:
        """Those of one judge, shape (n,)."""
        sequences = [answered(*pair, self.end) for pair in zip(prompts, completions, strict=True)]
        return self.models[place](sequences).double().numpy()


class PolicyTask(NamedTuple):
    """What a policy is measured on.

    Attributes:
        loaded: the reference.
        prompts: all of them, those trained on first.
        num_train: how many are trained on.
        observed: indices of those that are measured.
        judges: the rewards.
    """

    loaded: LoadedModel
    prompts: Sequence[Prompt]
    num_train: int
    observed: NDArray[np.int64]
    judges: Judges


class Paths(NamedTuple):
    """A forecast on n prompts at T times.

    Attributes:
        method: how it was made.
        figures: proxy reward, held-out reward, KL in nats, shape (T, 3, n).
    """

    method: str
    figures: FloatArray


class Measure(Protocol):
    """What a policy is worth, and what it will be."""

    @property
    def notes(self) -> list[str]:
        """What limits the figures."""
        ...

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Proxy reward, held-out reward and KL of each observed prompt, shape (3, n)."""
        ...

    def forecast(self, times: FloatArray, beta: float) -> list[Paths]:
        """Their course along the gradient flow of the output layer, at these Σ learning rates."""
        ...


class OneToken:
    """Exact over the likeliest answers of one token.

    Args:
        task: what is asked.
        candidates: how many answers.
    """

    def __init__(self, task: PolicyTask, *, candidates: int) -> None:
        """Choose the answers by their mean probability under the reference, and reward each after each prompt."""
        self._pairs = [
            EncodedPair(index, "", "", 1.0, prompt.ids, [0], [1], False) for index, prompt in enumerate(task.prompts)
        ]
        self._observed, self._num_train = task.observed, task.num_train
        states, logits = self._logits(task.loaded.model, self._pairs, None)
        probability = torch.softmax(logits, -1).mean(0)
        self.tokens = torch.topk(probability, candidates).indices
        self.share = float(probability[self.tokens].sum())
        # logits move by scale · h ΔWᵀ
        self.states = head_of(task.loaded.model).scale * states.double().numpy()
        self.reference = logits[:, self.tokens].double().numpy()
        answers = [[token] for token in self.tokens.tolist()]

        def rewards(judge: int, asked: Sequence[int]) -> FloatArray:
            flat = [(task.prompts[index].ids, answer) for index in asked for answer in answers]
            return task.judges.rewards(judge, *zip(*flat, strict=True)).reshape(len(asked), candidates)

        self.climbed = rewards(0, range(task.num_train))
        self.told = [rewards(judge, task.observed) for judge in (0, -1)]

    @property
    def notes(self) -> list[str]:
        """What share of the probability the answers have."""
        return [
            f"Reward and KL are exact over the {len(self.tokens)} likeliest one-token answers, which have "
            f"{self.share:.1%} of the reference's probability."
        ]

    @staticmethod
    @torch.no_grad()
    def _logits(
        model: nn.Module, pairs: Sequence[EncodedPair], tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States at the last prompt token, and logits of all tokens or some, both on the CPU in float32."""
        states = ForwardPass(model, packed=supports_packing(model)).states(pairs)
        head = head_of(model)
        logits = torch.cat(
            [head.logits(part)[:, slice(None) if tokens is None else tokens] for part in states.split(64)]
        )
        return states.float().cpu(), logits.float().cpu()

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Proxy reward, held-out reward and KL of each observed prompt, shape (3, n)."""
        _, logits = self._logits(model, [self._pairs[index] for index in self._observed], self.tokens)
        return torch.from_numpy(self._figures(logits.double().numpy()))

    def _figures(self, logits: FloatArray) -> FloatArray:
        """Of the observed prompts."""
        problems = [policy_problem(self.reference[self._observed], table, beta=0.0) for table in self.told]
        return np.stack([*(problem.expected_reward(logits) for problem in problems), problems[0].kl(logits)])

    def forecast(self, times: FloatArray, beta: float) -> list[Paths]:
        """Gradient flow of the output layer, exact; and the closed-form optimum, that no run exceeds."""
        train, seen = np.arange(self._num_train), self._observed
        problem = policy_problem(self.reference[train], self.climbed, beta=beta)
        changes = output_layer_flow(problem, self.states[train], times=times)
        path = [self._figures(self.reference[seen] + self.states[seen] @ change.T) for change in changes]
        paths = [Paths("gradient_flow", np.stack(path))]
        if beta > 0:
            best = policy_problem(self.reference[seen], self.told[0], beta=beta).optimum()
            paths.append(Paths("optimum", np.repeat(self._figures(best)[None], len(times), 0)))
        return paths


class Drawn:
    """Estimated from two answers drawn to each prompt.

    Args:
        task: what is asked.
        max_tokens: of an answer.
        seed: of the draws, the same at every step.
        store: where features of the reference's answers go.
    """

    def __init__(
        self,
        task: PolicyTask,
        *,
        max_tokens: int,
        seed: int,
        store: ShardStore,
    ) -> None:
        """Remember; nothing is drawn yet."""
        self._task, self._max_tokens, self._seed, self._store = task, max_tokens, seed, store

    @property
    def notes(self) -> list[str]:
        """How the figures were got."""
        return ["Reward and KL are estimated from two drawn answers a prompt; the forecast is of first order."]

    def _draw(self, model: nn.Module, prompts: NDArray[np.int64], seed: int) -> tuple[list[EncodedPair], FloatArray]:
        """Pairs of answers, and their rewards, shape (judges, 2, n)."""
        ids = [self._task.prompts[index].ids for index in prompts]
        pairs = draw_pairs(model, ids, self._task.loaded.tokenizer, max_tokens=self._max_tokens, seed=seed)  # pyright: ignore
        sides = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
        return pairs, self._task.judges.table(ids + ids, sides).reshape(-1, 2, len(pairs))

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Proxy reward, held-out reward and KL of each observed prompt, shape (3, n)."""
        pairs, table = self._draw(model, self._task.observed, self._seed)
        policies = (model, self._task.loaded.model)
        scores = [pair_scores(policy, pairs, packed=supports_packing(policy)) for policy in policies]
        ratios = torch.stack(list(scores[0])) - torch.stack(list(scores[1]))
        return torch.from_numpy(np.stack([table[0].mean(0), table[-1].mean(0), ratios.mean(0).numpy()]))

    def forecast(self, times: FloatArray, beta: float) -> list[Paths]:
        """First order around the reference; what it says of a behaviour is said of each of its prompts."""
        model, train, seen = self._task.loaded.model, np.arange(self._task.num_train), self._task.observed
        draws = [self._draw(model, train, self._seed + number) for number in (1, 2)]
        pairs = [pair for drawn, _ in draws for pair in drawn]
        measure_pairs(
            model, pairs, self._store, sketch_dim=SKETCH, packed=supports_packing(model), progress=lambda done: None
        )
        sketch = np.asarray(read_features(self._store, len(pairs)).sketch[:], dtype=float)
        gaps = np.stack([table[:, 0] - table[:, 1] for _, table in draws], 1)
        behaviour_of = np.array([self._task.prompts[index].behaviour for index in train])
        features = sketch.reshape(2, len(train), -1)
        found = [first_order(features, gaps[0], behaviour_of, measured=gap) for gap in (gaps[0], gaps[-1])]
        place = [found[0].behaviours.index(self._task.prompts[index].behaviour) for index in seen]
        start, clock = self(model).numpy(), times[:, None]
        growth = [clock * rates.reward_rate[place] + start[row] for row, rates in enumerate(found)]
        return [Paths("first_order", np.stack([*growth, clock**2 * found[0].kl_rate[place]], 1))]
