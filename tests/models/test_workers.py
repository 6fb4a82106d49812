"""Batches side by side: the same numbers, in order, and the caller's threads as they were."""

import threading
import weakref

import pytest
import torch
from tests.conftest import random_llama, threads

from foretune.models import forward_pass
from foretune.models.encoding import EncodedPair
from foretune.models.forward_pass import ForwardPass
from foretune.models.workers import side_by_side


def test_results_come_in_order_from_workers_that_overlap():
    together = threading.Barrier(2, timeout=30)

    def compute(item):
        together.wait()
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    with threads(2), torch.no_grad():
        assert side_by_side(compute, range(4), 2) == [(item, 1, False) for item in range(4)]
        assert torch.get_num_threads() == 2


def test_a_failure_is_the_callers():
    with threads(2), pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 // item, [1, 0, 1], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_those_of_one_worker(dtype):
    torch.manual_seed(0)
    model = random_llama(128).to(dtype).eval()
    begun = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2]]
    pairs = [
        EncodedPair(n, "b", "train", 1.0, begun[n % 2] + [10 + n] * (1 + n % 5), [7, 9, n % 60], [8], False)
        for n in range(90)
    ]
    with threads(1):
        expected = ForwardPass(model, overhead=0).states(pairs)
    with threads(3):
        forward = ForwardPass(model, budget=64, overhead=0)
        found = [forward.states(pairs) for _ in range(5)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(found[0], expected, atol=tolerance, rtol=tolerance)
    assert all(torch.equal(again, found[0]) for again in found)


@pytest.mark.parametrize("count", [1, 2])
def test_beginnings_are_kept_within_bounds(count, monkeypatch):
    monkeypatch.setattr(forward_pass, "KEPT_TOKENS", 20)
    torch.manual_seed(0)
    prompts = [[n, *range(1, 9)] for n in range(20) for _ in range(2)]
    pairs = [
        EncodedPair(i, "b", "train", 1.0, [*prompt, 50 + i % 2], [7], [8], False) for i, prompt in enumerate(prompts)
    ]
    alive, most = weakref.WeakSet(), []

    class Counted(forward_pass.Beginning):
        def __init__(self, length):
            super().__init__(length)
            alive.add(self)
            most.append(len(alive))

    model = random_llama(128).eval()
    expected = ForwardPass(model, share=False).states(pairs)
    monkeypatch.setattr(forward_pass, "Beginning", Counted)
    with threads(count):
        found = ForwardPass(model, overhead=0).states(pairs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(most) == 20 and max(most) <= 5  # nine tokens each: two in a wave, two kept from it, one begun


def test_a_beginning_is_kept_for_the_next_call_and_forgotten_when_that_does_not_use_it(monkeypatch):
    computed = []

    class Counted(forward_pass.Beginning):
        def __init__(self, length):
            super().__init__(length)
            computed.append(length)

    def pairs(first, length):
        prompt = [first, *range(1, length)]
        return [EncodedPair(n, "b", "train", 1.0, [*prompt, 50 + n], [7], [8], False) for n in range(2)]

    torch.manual_seed(0)
    model = random_llama(128).eval()
    expected = ForwardPass(model, share=False).states(pairs(11, 6))
    monkeypatch.setattr(forward_pass, "Beginning", Counted)
    forward = ForwardPass(model, overhead=0)
    for call in (pairs(11, 6), pairs(11, 6) + pairs(12, 7), pairs(11, 6)):
        torch.testing.assert_close(forward.states(call)[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert computed == [6, 7]
    forward.states(pairs(12, 7))
    assert computed == [6, 7, 7]
