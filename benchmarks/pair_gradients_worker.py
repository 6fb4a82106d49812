"""One way to compute pair gradients, in a process of its own: loads a job, then answers requests on standard input.

Started by `pair_gradients.py`. A peer's process may run in another environment, so foretune is imported only where it
is the method. A job is a folder with `job.json` (base model, token ids of the pairs) and `adapters.safetensors`.

    python benchmarks/pair_gradients_worker.py METHOD JOB_FOLDER DTYPE
"""

import contextlib
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


class Pair(NamedTuple):
    """What the methods are given; foretune wants `responses`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    per_token: bool = False

    @property
    def responses(self):
        return self.chosen_ids, self.rejected_ids


def load(folder: Path, dtype: torch.dtype):
    """The model with its adapters, and the pairs of each data set."""
    job = json.loads((folder / "job.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model = get_peft_model(base, LoraConfig(**job["lora"]), autocast_adapter_dtype=False).eval()
    adapters = load_file(folder / "adapters.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(adapters[name])
    return model, {name: [Pair(*row) for row in rows] for name, rows in job["pairs"].items()}


def sequences_of(pairs):
    """Sequence, first response token and sign of both responses, pair by pair."""
    return [
        (pair.prompt_ids + ids, len(pair.prompt_ids), sign)
        for pair in pairs
        for ids, sign in ((pair.chosen_ids, 1.0), (pair.rejected_ids, -1.0))
    ]


def batches_of(lengths, budget):
    """Indices in batches of similar length, at most `budget` tokens with padding."""
    batch = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def signed_log_probs(model, sequences):
    """Σ ± log π(response) over padded sequences, with logits as the model gives them."""
    length = max(len(ids) for ids, _, _ in sequences)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _, _ in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _, _ in sequences])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    total = 0.0
    for row, (tokens, start, sign) in enumerate(sequences):
        scored = logits[row, start - 1 : len(tokens) - 1]
        scored = scored.to(torch.promote_types(scored.dtype, torch.float32)).log_softmax(-1)
        total = total + sign * scored.gather(1, torch.tensor(tokens[start:])[:, None]).sum()
    return total


class Loop:
    """Autograd, one pair at a time."""

    def __init__(self, model):
        self.model = model
        self.chosen = {name: own for name, own in model.named_parameters() if own.requires_grad}

    def __call__(self, pairs, budget):
        rows = []
        for pair in pairs:
            margin = signed_log_probs(self.model, sequences_of([pair]))
            rows.append([part.flatten() for part in torch.autograd.grad(margin, list(self.chosen.values()))])
        return {name: torch.stack(column) for name, column in zip(self.chosen, zip(*rows, strict=True), strict=True)}


class Foretune:
    """This library."""

    def __init__(self, model):
        from foretune.features.pair_gradients import trainable_names

        self.model = model
        self.names = trainable_names(model)

    def __call__(self, pairs, budget):
        from foretune.features.gradient_pass import GradientPass
        from foretune.features.pair_gradients import batch_gradients

        own = next(self.model.parameters()).dtype
        run = GradientPass(self.model, budget=budget)
        return run(pairs, lambda view, batch: batch_gradients(view, batch, self.names, dtype=own).gradient)


class Pass:
    """Forward and backward of the same batches and nothing more: the margin's gradient summed over pairs."""

    def __init__(self, model):
        self.model = model

    def __call__(self, pairs, budget):
        from foretune.models.batches import states_of, targets_of, token_batches
        from foretune.models.head import head_of
        from foretune.scores import log_probs_of_states

        for batch in token_batches(pairs, budget=budget):
            members = [pairs[i] for i in batch]
            states = states_of(self.model, members)
            scores = log_probs_of_states(head_of(self.model, live=True), states, targets_of(members), len(members))
            (scores.chosen - scores.rejected).sum().backward()
        return {}


class Dattri:
    """dattri-llm's hooks around a loop of ours: its `HookManager` with gradients formed in the backward pass."""

    def __init__(self, model):
        from dattri_llm.gradient import CaptureCallback, HookManager, HookManagerConfig

        self.model = model
        self.names = [name for name, own in model.named_parameters() if own.requires_grad]
        self.capture = CaptureCallback()
        config = HookManagerConfig(linear_io=[r"lora_[AB]\."], capture_style="materialized")
        self.manager = HookManager(model, config=config, callbacks=[self.capture])

    def __call__(self, pairs, budget):
        sequences = sequences_of(pairs)
        found, order = [], []
        with self.manager.collect():
            for batch in batches_of([len(ids) for ids, _, _ in sequences], budget):
                signed_log_probs(self.model, [sequences[i] for i in batch]).backward()
                self.model.zero_grad()
                found.append(self.capture.record.gradient.data)
                order += batch
        back = torch.argsort(torch.tensor(order))
        joined = {name: torch.cat([part[name.removesuffix(".weight")] for part in found])[back] for name in self.names}
        return {name: own[0::2] + own[1::2] for name, own in joined.items()}


class Bergson:
    """bergson's collector with its own forward, backward and batches; the sign of a response is its `advantage`."""

    def __init__(self, model):
        if find_spec("bergson") is None:
            raise ImportError("bergson is not installed")
        self.model = model
        self.names = [name for name, own in model.named_parameters() if own.requires_grad]

    def __call__(self, pairs, budget):
        from bergson.collector.collector import CollectorComputer
        from bergson.collector.in_memory_collector import InMemoryCollector
        from bergson.config import IndexConfig
        from bergson.data import allocate_batches
        from datasets import Dataset

        sequences = sequences_of(pairs)
        data = Dataset.from_dict(
            {
                "input_ids": [ids for ids, _, _ in sequences],
                "labels": [[-100] * start + ids[start:] for ids, start, _ in sequences],
                "advantage": [-sign for _, _, sign in sequences],  # its loss is −log π
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            config = IndexConfig(run_path=f"{folder}/run", loss_reduction="sum", token_batch_size=budget)
            config.partial_run_path.mkdir()
            prefix = "base_model."
            collector = InMemoryCollector(
                model=self.model.base_model,
                data=data,
                cfg=config,
                target_modules={name.removeprefix(prefix).removesuffix(".weight") for name in self.names},
            )
            batches = allocate_batches([len(ids) for ids, _, _ in sequences], budget)
            computer = CollectorComputer(self.model, data, collector=collector, batches=batches, cfg=config)
            computer.run_with_collector_hooks(desc="gradients")
        found = {name: collector.gradients[name.removeprefix(prefix).removesuffix(".weight")] for name in self.names}
        return {name: own[0::2] + own[1::2] for name, own in found.items()}


METHODS = {"foretune": Foretune, "dattri-llm": Dattri, "bergson": Bergson, "loop": Loop, "pass": Pass}


def resident_peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    method, folder, dtype = sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3])
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    model, pairs = load(folder, dtype)
    try:
        compute = METHODS[method](model)
    except ImportError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({"ready": True, "resident": resident_peak()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        members = pairs[request["data"]][: request.get("count")]
        with open("/dev/null", "w") as nowhere, contextlib.redirect_stderr(nowhere):
            start = time.perf_counter()
            found = compute(members, request["budget"])
            seconds = time.perf_counter() - start
        if "save" in request:
            save_file({name: own.contiguous() for name, own in found.items()}, request["save"])
        size = sum(own.nbytes for own in found.values())
        answer = {"seconds": seconds, "peak": resident_peak(), "gradient_bytes": size}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
