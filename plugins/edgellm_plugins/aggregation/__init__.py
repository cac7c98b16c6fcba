"""Server rules: updates in, next state out."""
