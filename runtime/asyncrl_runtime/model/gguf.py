"""Converts a GGUF file, which some Python packages ship, into a Hugging Face folder."""

import importlib.util
import logging
from pathlib import Path

from asyncrl_api.exits import ExitCode, ExitError

log = logging.getLogger(__name__)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config, bfloat16 weights and tokenizer of a Llama-family GGUF file into `folder`.

    The weights are dequantized once. The state dict is copied into a fresh model, since the loaded one
    would carry its quantization config into the saved folder.

    Raises:
        ExitError: a package that the conversion needs is not installed.
    """
    if missing := [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]:
        raise ExitError(
            ExitCode.REFUSED,
            f"spec.model.source: converting {file.name} needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}",
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s", file.name)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**where)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
