"""What everybody speaks of: cases, records, devices, processes, errors, files, units."""
