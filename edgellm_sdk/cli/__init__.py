"""The `edgellm` command."""
