"""Training with forward passes only."""
