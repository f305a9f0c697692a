"""Building TensorRT's engines: the library found and loaded, a graph compiled, its log read."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

TENSORRT = ("tensorrt",)
RTX = ("tensorrt_rtx", "tensorrt_rtx_bindings")
# ONNX Runtime's provider for TensorRT-RTX brings the libraries that the bindings need, and is the
# only package on the Python index that does.
_RTX_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"

_TOLD = re.compile(r"Total (Weights|Activation|Device Persistent) Memory: (\d+) bytes")
# Shapes, axes and epsilons are constants too, and end up in the code.
_SCALAR_BYTES = 128


@dataclass
class Built:
    """What a build has told: sums from its log, and bytes that follow from the network."""

    told: dict[str, int] = field(default_factory=dict)
    constant_bytes: int = 0
    io_bytes: int = 0
    engine_bytes: int = 0


def build(trt: Any, graph: Path, capability: str | None, file: BinaryIO | None) -> Built:
    """Build the graph for a compute capability (None: this GPU's) into `file`, or into nothing.

    Raises RuntimeError where TensorRT can't, or does not tell what an engine for elsewhere takes.
    """
    built = Built()
    log = logger(trt, built.told)
    builder = trt.Builder(log)
    # TensorRT 11 knows no other networks, and may have lost the flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise RuntimeError(f"TensorRT can't read the graph: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.max_aux_streams = 0
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    ends = [network.get_input(i) for i in range(network.num_inputs)]
    ends += [network.get_output(i) for i in range(network.num_outputs)]
    built.io_bytes = sum(math.prod(end.shape) * end.dtype.itemsize for end in ends)
    built.constant_bytes = _constant_bytes(trt, network)
    writer = _writer(trt, built, file)
    if not builder.build_serialized_network_to_stream(network, config, writer):
        raise RuntimeError("TensorRT could not build the engine; its log says why")
    missing = {"Weights", "Activation", "Device Persistent"} - set(built.told)
    if missing and capability is not None:
        raise RuntimeError(f"TensorRT {trt.__version__} does not tell: {', '.join(missing)}")
    return built


def _constant_bytes(trt: Any, network: Any) -> int:
    """Bytes of all constants as the graph has them: parameters, masks and tables of positions."""
    layers = map(network.get_layer, range(network.num_layers))
    outputs = [one.get_output(0) for one in layers if one.type == trt.LayerType.CONSTANT]
    sizes = [math.prod(output.shape) * output.dtype.itemsize for output in outputs]
    return sum(size for size in sizes if size > _SCALAR_BYTES)


def logger(trt: Any, told: dict[str, int] | None = None) -> Any:
    """A logger that prints what matters, and notes the memory that a build tells."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            found = _TOLD.search(message)
            if found and told is not None:
                told[found[1]] = int(found[2])
            if found or int(severity) <= int(trt.ILogger.Severity.WARNING):
                sys.stderr.write(f"TensorRT: {message}\n")

    return Logger()


def _writer(trt: Any, built: Built, file: BinaryIO | None) -> Any:
    """Where the engine goes; to memory first it would take its own size once more."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            built.engine_bytes += len(data)
            return len(data) if file is None else file.write(data)

    return Writer()


def load(name: str) -> Any:
    """Import the module; for TensorRT-RTX's bindings alone, load the libraries first."""
    spec = importlib.util.find_spec(_RTX_LIBRARIES)
    if name in RTX and spec is not None and spec.origin is not None:
        for library in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
            found = sorted(Path(spec.origin).parent.glob(f"{library}.so.*.*.*"))
            if found:
                ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module(name)
