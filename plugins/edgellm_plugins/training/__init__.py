"""Training with back-propagation one layer at a time."""
