"""Memory of LLM layers under inference frameworks: measured, explained, predicted."""

__version__ = "0.1.0"
