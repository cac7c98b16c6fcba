"""The built-in backends, one folder each."""
