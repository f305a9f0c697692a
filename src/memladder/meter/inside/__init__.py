"""In the measured process tree: the guard, the worker, and the known sizes of a calibration."""
