"""Runs an example in a process with the examples' slow imports: `example_program.py FOLDER SCRIPT`."""

from __future__ import annotations

import os
import runpy
import sys

os.environ.pop("TRITON_INTERPRET", None)  # before Triton reads it; examples are not interpreted

import accelerate  # noqa: F401
import datasets  # noqa: F401
from peft import PeftModel  # noqa: F401
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
from trl import SFTTrainer  # noqa: F401

from rkif.hf import RKIFTrainer  # noqa: F401

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    runpy.run_path(sys.argv[2], run_name="__main__")
