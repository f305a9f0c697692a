"""Runs a module as `python -m` does, but imports nothing from the working directory.

    python start.py MODULE ARGUMENT...

Python 3.11 and later heed PYTHONSAFEPATH; 3.10 puts the working directory, or this file's folder,
first on the path, where any file could stand for a module. `children` starts every child so.
"""

import sys

if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

import runpy

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
