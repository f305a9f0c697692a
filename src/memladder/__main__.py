"""`python -m memladder` is `memladder`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # The working directory, which `-m` puts first.
        del sys.path[0]

    from memladder.cli.entry import main

    main()
