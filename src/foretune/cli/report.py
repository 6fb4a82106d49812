"""`foretune report`: the page, the summary, JSON or a model-card block from a run folder."""

import argparse
import json
from collections.abc import Sequence

from foretune.cli.finish import finish
from foretune.cli.run_folder import add_run_folder
from foretune.records import load_run
from foretune.report import model_card_block, to_json


def run(arguments: Sequence[str]) -> None:
    """Parse and show."""
    parser = argparse.ArgumentParser("foretune report", description="Show what a run folder holds.")
    add_run_folder(parser)
    parser.add_argument("--format", default="html", choices=["html", "json", "card"], help="json and card go to stdout")
    given = parser.parse_args(arguments)
    folder = load_run(given.output_dir)
    if given.format == "json":
        print(json.dumps(to_json(folder.path), indent=1, ensure_ascii=False))
    elif given.format == "card":
        print(model_card_block(folder.path))
    else:
        finish(folder)
