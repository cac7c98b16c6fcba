"""The built-in methods, one folder each under its family."""
