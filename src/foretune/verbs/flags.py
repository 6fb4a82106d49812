"""What a user says on the command line and in a configuration file; help that begins with what is foretune's own."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import compress
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import TrlParser

from foretune import processes
from foretune.errors import UserError
from foretune.records import RunFolder

# Of the arguments of TRL, those that the short help names.
USUAL = (
    *("model_name_or_path", "dataset_name", "output_dir", "learning_rate", "per_device_train_batch_size"),
    *("num_train_epochs", "max_steps", "use_peft", "lora_r", "beta", "loss_type", "seed"),
)
METAVARS = {"int": "N", "float": "X", "bool": "BOOL"}


def spoken_arguments(
    arguments: Sequence[str],
    kinds: Sequence[type],
    *,
    prog: str,
    defaults: Mapping[str, Any] | None = None,
    verb: argparse.ArgumentParser | None = None,
) -> dict[str, Any]:
    """What the user said, of the arguments of `kinds`: flags, configuration file, or the run folder's config.yaml.

    Args:
        arguments: of the command line, those of `verb` taken out.
        kinds: TRL's and our dataclasses.
        prog: what help calls the command.
        defaults: where flags, file and folder say nothing.
        verb: further arguments, which help lists first.

    Raises:
        UserError: a configuration that cannot be read.
    """
    said = _said_by_flags(list(arguments), kinds, prog, verb)
    from_file = _read_config(said.pop("config", None))
    spoken = {**from_file, **said}
    defaults = defaults or {}
    if not {"model_name_or_path", "dataset_name"} & set(spoken):
        folder = RunFolder(str(spoken.get("output_dir") or defaults.get("output_dir") or "trainer_output"))
        spoken = {**(folder.read_yaml("config.yaml") or {}), **spoken}
    return {**defaults, **spoken}


def _said_by_flags(
    arguments: list[str], kinds: Sequence[type], prog: str, verb: argparse.ArgumentParser | None
) -> dict[str, Any]:
    """Only the flags that were given, as TRL's parser types them."""
    trainer = next(kind for kind in kinds if issubclass(kind, TrainingArguments))
    command = f"trl {trainer.__name__.removesuffix('Config').lower()}"
    parser = TrlParser(
        kinds,  # pyright: ignore
        prog=prog,
        usage=f"{prog} [--config FILE] [--argument value ...]",
        formatter_class=_Help,
        parents=[verb] if verb else [],
    )
    parser.add_argument("--config", metavar="FILE", help=f"YAML file with any of these arguments, as for `{command}`.")
    parser.add_argument("--help_all", action="help", help=f"List the arguments of `{command}` as well.")
    _describe(parser, kinds, command, everything="--help_all" in arguments)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    if not processes.is_main():
        parser._print_message = lambda *_: None  # usage and errors are shown once
    # argparse ends the process with code 2 and a sentence on unknown flags and unreadable values
    return vars(parser.parse_args(arguments))


def _describe(parser: argparse.ArgumentParser, kinds: Sequence[type], command: str, *, everything: bool) -> None:
    """Say defaults of our own arguments; leave TRL's out, but for their number and the usual ones."""
    is_ours = [kind.__module__.startswith("foretune") for kind in kinds]
    ours = {item.name: item for kind in compress(kinds, is_ours) for item in fields(kind)}
    theirs = {item.name for kind, own in zip(kinds, is_ours, strict=True) if not own for item in fields(kind)}
    for action in parser._actions:
        if action.dest in theirs or action.option_strings[0].startswith("--no_"):
            action.help = action.help if everything else argparse.SUPPRESS
            continue
        if item := ours.get(action.dest):
            if not action.choices:
                action.metavar = next((own for name, own in METAVARS.items() if name in str(item.type)), "TEXT")
            if "efault" not in str(action.help) and item.default is not None and item.default is not False:
                action.help = f"{action.help} Default: {item.default}."
    usual = " ".join(f"--{name}" for name in USUAL if name in theirs)
    parser.epilog = (
        f"All {len(theirs)} arguments of `{command}` are taken as well, such as {usual}; --help_all lists them."
    )


class _Help(argparse.HelpFormatter):
    """One spelling of each argument; those with hyphens are taken as well."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"


def _read_config(path: str | None) -> dict[str, Any]:
    import yaml

    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"the configuration {path} must be a YAML mapping of argument names to values.")
    if strange := [name for name in content if not isinstance(name, str)]:
        raise UserError(f"the configuration {path} has the key {strange[0]!r}: keys must be names of arguments.")
    variables = content.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise UserError(f"env in the configuration {path} must be a mapping of environment variables to values.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return content
