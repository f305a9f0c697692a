"""What Figure 11 of the Ladder paper (OSDI'24) shows, in its order. Importing this is cheap."""

from __future__ import annotations

from memladder.core.case import Workload

MODELS = {"llama": "LLAMA", "bloom": "BLOOM"}
"""Panels, with the paper's labels."""
SYSTEMS = {
    "pytorch": "PyTorch-Inductor",
    "onnxruntime": "ONNXRuntime",
    "tensorrt": "TensorRT",
    "vllm": "vLLM",
    "vllm_fp16_int4": "vLLM-W_INT4 A_FP16",
    "welder": "Welder",
    "ladder": "Ladder",
    "ladder_fp16_int4": "Ladder-W_INT4 A_FP16",
    "ladder_fp16_nf4": "Ladder-W_NF4 A_FP16",
    "ladder_fp8_fp8": "Ladder-W_FP8 A_FP8",
    "ladder_mxfp8_mxfp8": "Ladder-W_MXFP8 A_MXFP8",
    "ladder_int8_int1": "Ladder-W_INT1 A_INT8",
}
"""Rows, with the labels of the paper's legend."""
SHAPES = (Workload(1, 1), Workload(32, 1), Workload(1, 4096))
"""Groups of a panel."""
