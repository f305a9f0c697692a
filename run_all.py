#!/usr/bin/env python3
"""Draw Figure 11 from the published data, or with --reproduce measure it here and draw that."""

from memladder.cli.entry import run_all

if __name__ == "__main__":
    run_all()
