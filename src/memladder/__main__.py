"""`python -m memladder` is `memladder`."""

from memladder.cli.main import main

if __name__ == "__main__":
    main()
