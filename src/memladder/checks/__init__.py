"""Checks of the machine and of the meter against known values."""
