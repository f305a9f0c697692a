"""A layer as steps over buffers: lowered from the fused graph, and their places in one arena."""
