"""Files that a device runs."""
