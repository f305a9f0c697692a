"""The engine: a layer's weights packed in a number format, its program, the plan of its memory, and
its execution, which allocates nothing.

    checkpoint, weights ──▶ packing ──▶ packed layer ┐
    programs ──▶ program ──▶ plan (one arena) ───────┴──▶ execute, by the kernels
"""
