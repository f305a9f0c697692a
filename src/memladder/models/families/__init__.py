"""Families with a configuration of their own: one file each, whose name is the key users type."""
