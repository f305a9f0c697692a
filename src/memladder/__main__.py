"""`python -m memladder` is `memladder`."""

from memladder.cli import main

main()
