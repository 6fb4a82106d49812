"""The paper's claims on one data set: verdicts and numbers of `foretune reproduce`, without the plots.

The criteria are those of `foretune.claims`, fixed before the runs. A run that was stopped goes on from its folder.

    python benchmarks/reproduce.py --name persona --data ../shared/data/persona --quick
"""

import argparse
import json
from pathlib import Path

from harness import RESULTS, machine

import foretune
from foretune.verbs.progress import Progress

LEFT_OUT = ("plots", "key")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="bundled", help="of the result")
    parser.add_argument("--data", default="bundled:statements")
    parser.add_argument("--cache", type=Path, default=None, help="the run folder (default: .cache/reproduce-{name})")
    parser.add_argument("--claims", help="only these, with commas between them")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    run = foretune.reproduce(
        claims=given.claims.split(",") if given.claims else None,
        quick=given.quick,
        progress=Progress(),
        dataset_name=given.data,
        output_dir=str(given.cache or Path(".cache") / f"reproduce-{given.name}"),
    )
    pages = run.read_json("claims.json")
    content = {
        "machine": machine(),
        "data": Path(given.data).name,
        "model": run.record["provenance"]["model"],
        "quick": given.quick,
        "claims": [{key: value for key, value in page.items() if key not in LEFT_OUT} for page in pages],
    }
    target = RESULTS / "reproduce" / f"{given.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for page in pages:
        print(page["claim"], page["verdict"], page["reason"] or "")


if __name__ == "__main__":
    main()
