"""Training with back-propagation in the memory of inference."""
