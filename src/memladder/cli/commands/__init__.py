"""One file a command: how it is typed, and what it does. None imports torch before it runs."""
