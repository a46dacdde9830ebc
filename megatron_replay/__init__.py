"""Logits Replay + MoClip: fine-tune a language model on its own candidate sets, and forget less."""

__version__ = "0.1.0"
