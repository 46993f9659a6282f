"""Data sets in, tensors out: loading, checking, splitting and augmented views of images."""
