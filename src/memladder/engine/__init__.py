"""The engine: a layer's weights packed in a number format, its program, the plan of its memory, and
its execution, which allocates nothing.

    ONNX ──▶ frontend ──▶ graph ──▶ compile ──▶ program ──▶ plan (one arena) ┐
    checkpoint, weights ──▶ packed ──▶ packed layer ─────────────────────────┴──▶ run
"""
