"""The feature pass against the two usual ways to get hidden states and log-probabilities, on real preference data.

Criteria, fixed before the first run, same dtype for all: on persona at least 5 times as fast as a loop at batch size 1
with `output_hidden_states` and as padded batches of separate sequences through the output layer; on HH dialogue at
least twice as fast as padded batches; at least 75 % of the machine's matrix-product ceiling on the tokens that must be
computed. foretune's time is that of `measure_pairs`: it contains sketches of gradients and writing, which the others
do not do.

    python benchmarks/features.py --data ../shared/data
"""

import argparse
import random
import tempfile
from pathlib import Path
from statistics import median

import torch
from harness import copy_ceiling, machine, matmul_ceiling, race, read, times_faster, write

from foretune.data import load_preferences
from foretune.features.store import ShardStore
from foretune.features.unembedding import PAIRS_PER_SHARD, measure_pairs
from foretune.models.batches import num_states, packed_length
from foretune.models.beginnings import group_by_beginning
from foretune.models.encoding import EncodedPair, encode
from foretune.models.forward_pass import OVERHEAD, ForwardPass
from foretune.models.load import load_model

SOURCES = {"persona": "persona", "hh": "hh/harmless-base-test.jsonl.gz"}
BATCH_SIZES = [8, 16, 32]
# The slow methods do fewer pairs, evenly spread by length; their seconds are scaled by the tokens of both responses.
SLOW_PAIRS = {"persona": 48, "hh": 16}


def pairs_of(source: Path, count: int, tokenizer) -> list[EncodedPair]:
    """A random sample of pairs."""
    rows = load_preferences(str(source), test_fraction=0.0, max_pairs_per_behaviour=max(count // 20, 10)).train
    if len(rows) < count:
        rows = load_preferences(str(source), test_fraction=0.0).train
    chosen = random.Random(0).sample(range(len(rows)), count)
    return list(encode(rows.select(chosen), tokenizer, split="train", max_length=512))


@torch.no_grad()
def loop(model, pairs: list[EncodedPair]) -> list[float]:
    """Batch size 1, all hidden states, whole logits."""
    margins = []
    for pair in pairs:
        scores = []
        for response in (pair.chosen_ids, pair.rejected_ids):
            output = model(torch.tensor([pair.prompt_ids + response]), output_hidden_states=True, use_cache=False)
            scores.append(scored(output.logits[0], len(pair.prompt_ids), response))
            output.hidden_states[-1][0, len(pair.prompt_ids) - 1 :].clone()
        margins.append(scores[0] - scores[1])
    return margins


@torch.no_grad()
def padded(model, pairs: list[EncodedPair], batch_size: int) -> list[float]:
    """Chosen and rejected as separate rows of padded batches, whole logits, as trainers compute them."""
    margins = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        rows = [
            (pair.prompt_ids, ids)
            for side in (0, 1)
            for pair in batch
            for ids in [(pair.chosen_ids, pair.rejected_ids)[side]]
        ]
        length = max(len(prompt) + len(ids) for prompt, ids in rows)
        ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
        for place, (prompt, response) in enumerate(rows):
            ids[place, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            mask[place, : len(prompt) + len(response)] = 1
        output = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        scores = [scored(output.logits[place], len(prompt), response) for place, (prompt, response) in enumerate(rows)]
        margins += [scores[place] - scores[place + len(batch)] for place in range(len(batch))]
    return margins


def scored(logits: torch.Tensor, start: int, response: list[int]) -> float:
    own = logits[start - 1 : start - 1 + len(response)].float()
    return float(own.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())


def work(model, pairs: list[EncodedPair]) -> dict[str, float]:
    """Tokens and FLOPs that the pass must compute: matrix products of layers, attention and output layer."""
    config = model.config
    layers = sum(p.numel() for name, p in model.named_parameters() if "layers." in name and p.dim() == 2)
    tokens, keys = 0, 0.0
    for start in range(0, len(pairs), PAIRS_PER_SHARD):
        for shared, members in group_by_beginning(pairs[start : start + PAIRS_PER_SHARD], overhead=OVERHEAD["cpu"]):
            for member in members:
                pair = pairs[start + member]
                prompt = len(pair.prompt_ids)
                tokens += packed_length(pair) - shared
                keys += sum(range(shared + 1, prompt + 1))
                keys += sum(prompt + t for ids in (pair.chosen_ids, pair.rejected_ids) for t in range(1, len(ids)))
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    states = sum(num_states(pair) for pair in pairs)
    head = 2 * states * config.vocab_size * config.hidden_size
    return {
        "tokens_a_pair": sum(map(packed_length, pairs)) / len(pairs),
        "tokens_computed_a_pair": tokens / len(pairs),
        "pass_flops": 2 * layers * tokens + attention,
        "head_flops": head,
    }


def spread_by_length(pairs: list[EncodedPair], count: int) -> list[EncodedPair]:
    """Pairs at even distances in the order of length, shuffled."""
    step = len(pairs) // count
    some = sorted(pairs, key=separate_tokens)[step // 2 :: step]
    return random.Random(1).sample(some, len(some))


def separate_tokens(pair: EncodedPair) -> int:
    """Tokens where each response has a sequence of its own."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def fastest_batch_size(model, pairs: list[EncodedPair]) -> int:
    """Of padded batches, on `pairs`."""
    methods = {size: lambda size=size: padded(model, pairs, size) for size in BATCH_SIZES if size <= len(pairs)}
    taken = race({f"padded, {size}": method for size, method in methods.items()}, rounds=1, warm_up=False)
    return min(methods, key=lambda size: taken[f"padded, {size}"])


def study(source: str, data: Path, dtype: torch.dtype, count: int, rounds: int, earlier: dict | None) -> dict:
    """One data set in one dtype; rounds are added to those of an earlier study of the same."""
    loaded = load_model("smollm2-135m", dtype=dtype)
    model = loaded.model.eval()
    pairs = pairs_of(data / SOURCES[source], count, loaded.tokenizer)
    some = spread_by_length(pairs, SLOW_PAIRS[source])
    best_size = earlier["padded_batch_size"] if earlier else fastest_batch_size(model, some)
    ceilings = []

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            measure_pairs(model, pairs, ShardStore(Path(folder), "benchmark"))

    forward = ForwardPass(model)
    methods = {
        "foretune": ours,
        "forward pass alone": lambda: [
            forward.states(pairs[start : start + PAIRS_PER_SHARD]) for start in range(0, count, PAIRS_PER_SHARD)
        ],
        "ceiling": lambda: ceilings.append(matmul_ceiling(dtype)),
        "loop": lambda: loop(model, some),
        "padded": lambda: padded(model, some, best_size),
    }
    measured = race(methods, rounds=rounds, earlier=earlier and earlier["seconds"])
    ceilings = [*(earlier["matmul_flops"] if earlier else []), *ceilings[1:]]
    scale = sum(map(separate_tokens, pairs)) / sum(map(separate_tokens, some))
    seconds = measured | {name: [scale * took for took in measured[name]] for name in ("loop", "padded")}
    counted = work(model, pairs)
    everything = counted["pass_flops"] + counted["head_flops"]
    return {
        "machine": machine(),
        "pairs": count,
        "padded_batch_size": best_size,
        "work": counted,
        "slow_methods_scaled_by": scale,
        "seconds": {name: measured[name] for name in measured if name != "ceiling"},
        "rows_per_second": {name: count / median(seconds[name]) for name in ("foretune", "loop", "padded")},
        "times_faster": times_faster({name: seconds[name] for name in ("foretune", "loop", "padded")}, "foretune"),
        "matmul_flops": ceilings,
        "share_of_ceiling": {
            "forward_pass": median(
                counted["pass_flops"] / took / best
                for took, best in zip(seconds["forward pass alone"], ceilings, strict=True)
            ),
            "everything": median(
                everything / took / best for took, best in zip(seconds["foretune"], ceilings, strict=True)
            ),
        },
    }


def main() -> None:
    """Run the studies and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--add", action="store_true", help="add rounds to the recorded ones, instead of starting anew")
    parser.add_argument("--sources", nargs="+", default=[*SOURCES], choices=[*SOURCES])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    found = (read("features") or {"studies": {}})["studies"]
    for source in options.sources:
        count = {"persona": 768, "hh": 48}[source]
        for dtype in (getattr(torch, name) for name in options.dtypes):
            name = f"{source}, {str(dtype).removeprefix('torch.')}"
            print(name, flush=True)
            earlier = found.get(name) if options.add else None
            found[name] = study(source, options.data, dtype, count, options.rounds, earlier)
            write("features", {"copy_bytes_per_second": copy_ceiling(), "studies": found})
            summary = found[name]
            print({key: summary[key] for key in ("rows_per_second", "times_faster", "share_of_ceiling")}, flush=True)


if __name__ == "__main__":
    main()
