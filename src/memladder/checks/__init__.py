"""What is held against something known: the machine, the meter."""
