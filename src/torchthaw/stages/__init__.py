"""Stages of a fine-tuning run in plain torch: plans, freezing, BatchNorm policy, parameter groups, proof."""
