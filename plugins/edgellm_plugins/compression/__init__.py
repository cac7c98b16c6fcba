"""Smaller models with a measured loss."""
