"""A layer's weights in a number format: read from a checkpoint, quantised, kept in one file."""
