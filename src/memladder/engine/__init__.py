"""The engine: a layer's weights packed in a number format, its program, the plan of its memory, and
its execution, which allocates nothing.

    ONNX ──▶ graph ──▶ compiler ──▶ fused layer ──▶ program ──▶ plan (one arena) ┐
    checkpoint, weights ──▶ packing ──▶ packed layer ────────────────────────────┴──▶ execute
"""
