#!/usr/bin/env python3
"""Measure the memory of one decoder layer under one framework, at one shape."""

from memladder.cli.entry import measure_memory

if __name__ == "__main__":
    measure_memory()
