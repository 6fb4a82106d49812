"""Load any decoder for causal language modelling: hub id, local folder, GGUF file, or the embedded model."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import patch_environment
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from foretune import processes
from foretune.errors import UserError, first_line
from foretune.models.dtype import fastest_dtype
from foretune.models.embedded import EMBEDDED_MODEL, EMBEDDED_NOTE, converted, embedded_gguf
from foretune.models.sharded import whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel(NamedTuple):
    """A model with its tokenizer, in evaluation mode.

    Attributes:
        model: the decoder with its output layer.
        tokenizer: its tokenizer, with a padding token.
        name: what the user asked for.
        folder: what transformers was given: a hub id or a local folder.
        note: what a reader of the figures must know about these weights, or None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: str
    note: str | None


def resolve_name(name: str) -> tuple[str, str | None]:
    """The folder or hub id to load for `name`, and a note on the weights; GGUF files are converted once."""
    if name == EMBEDDED_MODEL:
        return str(converted(embedded_gguf())), EMBEDDED_NOTE
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"no such GGUF file: {name}.")
        return str(converted(Path(name).resolve())), f"dequantised from {Path(name).name}"
    return name, None


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights: named, or measured on the device for `auto` (and None)."""
    if dtype in (None, "auto"):
        return fastest_dtype(device)
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}': use auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    sharded: bool = False,
) -> LoadedModel:
    """Load model and tokenizer; never runs remote code unless asked, never unpickles.

    Args:
        name: hub id, local folder, GGUF file, or the embedded model.
        dtype: of the weights.
        revision: of the hub.
        trust_remote_code: run code that comes with the model.
        attn_implementation: as transformers takes it.
        sharded: each process keeps a part of every layer (FSDP2), on its device.

    Raises:
        UserError: unknown name, not a causal language model, or weights that are not finite.
    """
    folder, note = resolve_name(name)
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    placement = {"distributed_config": DistributedConfig(fsdp_size=processes.count())} if sharded else {}
    try:
        AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        # otherwise, under FSDP, all processes but one would be left with empty weights
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=attn_implementation,
                **options,
                **placement,
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot load '{name}' as a causal language model ({first_line(error)}): give a hub id, a local "
            f"folder with safetensors, a .gguf file, or {EMBEDDED_MODEL}."
        ) from error
    check_finite(model, name)
    pad_with_end(tokenizer, name)
    return LoadedModel(model.eval(), tokenizer, name, folder, note)


def pad_with_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Where a tokenizer has no padding token, pad with its end token; refuse one that has neither."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"the tokenizer of '{name}' has neither a padding nor an end token: set pad_token in the "
            "tokenizer_config.json of its folder."
        )


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse weights that hold NaN or infinity, naming the first such parameter."""
    for parameter_name, parameter in model.named_parameters():
        values = whole(parameter)
        # NaN comes through both ends; far cheaper than a mask of all numbers
        if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            raise UserError(f"the weights of '{name}' are broken: {parameter_name} holds NaN or infinity.")


# Of a configuration: what changes no number that the model computes in a given dtype.
WITHOUT_EFFECT = {
    *("architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def _of_numbers(config: Any) -> Any:
    """A configuration without such entries, those of its parts included."""
    if not isinstance(config, dict):
        return config
    named = {str(key): value for key, value in config.items()}
    return {key: _of_numbers(value) for key, value in named.items() if key not in WITHOUT_EFFECT and key[:1] != "_"}


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the configuration and names, shapes, bytes of all parameters: what a result was computed from."""
    digest = hashlib.sha256(json.dumps(_of_numbers(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(whole(parameter).detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
