"""Where the bytes of a measured case went: its ledger, explained, and two laid side by side."""
