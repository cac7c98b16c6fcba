"""Methods that are about the federation: who works how, on what, and what keeps clients together."""
