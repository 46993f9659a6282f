"""Staged training in the Hugging Face Trainer: arguments, trainer, records of stages."""
