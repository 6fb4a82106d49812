"""The run folder that a verb is told, by itself or with the flag that training verbs have."""

import argparse


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Let `parser` know `output_dir`: `foretune report run` is `foretune report --output_dir run`."""
    parser.add_argument("output_dir", nargs="?", default=argparse.SUPPRESS, help="the run folder")
    parser.add_argument("--output_dir", default="trainer_output", help="the same")
