"""Recurrent-KIF inside a Hugging Face Trainer."""

from rkif.hf.trainer import RKIFMixin, RKIFTrainer

__all__ = ["RKIFMixin", "RKIFTrainer"]
