"""llama.cpp in Q4_0, through llama-cpp-python: a model of one block, fed with hidden states.

On the CPU llama.cpp rounds what a matrix is multiplied with to Q8_0, int8 in blocks of 32. Tokens
go through in batches of 512, keys and values through an fp16 cache of just the case's size. BLOOM's
hidden states pass the norm that stands behind its embeddings first, here as in the reference.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memladder.frameworks._shared.base import (
    Availability,
    Framework,
    Job,
    OutOfMemoryError,
    Session,
    Setting,
)
from memladder.models import gguf_export, hidden_size, weights

if TYPE_CHECKING:
    import numpy as np
    import torch

    from memladder.frameworks._rules.question import Answer, Question

_INSTALL = "pip install 'memladder[llamacpp]'"
_NEEDED = ("llama_cpp", "gguf", "torch", "transformers", "safetensors")
_TOKENS_AT_ONCE = 512
_OUTPUT = b"l_out-0"


class LlamaCpp(Framework):
    """A llama_context on a one-block model."""

    title = "llama.cpp-W_INT4 A_INT8"
    packages = ("llama-cpp-python", "gguf", "torch", "transformers", "safetensors")
    variables = ("GGML_*", "LLAMA_*")
    rounds_as_layer = False

    def availability(self, device: str) -> Availability:
        """CUDA needs llama.cpp's CUDA backend, which only builds from source have."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            return Availability(False, None, f"{', '.join(missing)} not installed", _INSTALL)
        version = importlib.metadata.version("llama-cpp-python")
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None
        assert spec.origin is not None
        library = Path(spec.origin).parent / "lib" / "libggml-cuda.so"
        if device != "cpu" and not library.exists():
            install = f"CMAKE_ARGS=-DGGML_CUDA=on {_INSTALL}"
            return Availability(False, version, "llama.cpp is built without CUDA here", install)
        return Availability(True, version)

    def prepare(self, job: Job) -> None:
        """The GGUF file."""
        gguf_export.ensure(job.config, job.cache_dir, job.seed)

    def makes(self, job: Job) -> str:
        """The same for all shapes."""
        return f"{job.config.digest} q4_0"

    def weight_bytes(self, job: Job) -> int:
        """18 bytes for 32 elements of a matrix, four for one of a vector."""
        return gguf_export.layer_bytes(job.config)

    def reference(self, job: Job) -> np.ndarray:
        """The layer in float32 with its matrices in Q4_0, and what they take in Q8_0."""
        import torch
        from gguf import GGMLQuantizationType as Kind
        from torch.nn import functional

        from memladder.frameworks._shared.torch_quantised import linears
        from memladder.models import layer

        path = weights.ensure(job.config, job.cache_dir, job.seed)
        cpu = torch.device("cpu")
        made = layer.load(job.config, path, job.case.shape, torch.float32, cpu)
        for name, linear in linears(made.block):
            layer.put(made, f"{name}.weight", _through(linear.weight, Kind.Q4_0))
            linear.register_forward_pre_hook(lambda _, inputs: (_through(inputs[0], Kind.Q8_0),))
        states = torch.from_numpy(weights.hidden_states(job.config, job.case.shape, job.seed))
        states = states.float()
        if job.config.model == "bloom":
            width, epsilon = states.shape[-1:], job.config.values["layer_norm_epsilon"]
            states = functional.layer_norm(states, width, eps=epsilon)
        with torch.inference_mode():
            output: np.ndarray = made(states).numpy()
        return output

    def predict(self, question: Question) -> Answer:
        """The file's tensors, cells, compute buffer (`_rules/llamacpp.py`)."""
        from memladder.frameworks._rules import llamacpp, stored

        return llamacpp.predict(question, stored.SCHEMES["q4_0"])

    def tolerance(self, device: str) -> float:
        """As for Ladder's int8 on CUDA: rounding is a step, and sums in another order move some
        values over one."""
        del device
        return 1e-2

    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        """Import llama-cpp-python."""
        return _Session(job, announce)


class _Session(Session):
    def __init__(self, job: Job, announce: Callable[[str], None]) -> None:
        super().__init__(job, announce)
        import llama_cpp

        self._llama = llama_cpp
        self._on_cuda = job.case.device != "cpu"

    def context(self) -> None:
        """llama.cpp's backends."""
        self._llama.llama_backend_init()

    def weights(self) -> None:
        """Read the file: mapped, it would stay beside the copy that the kernels want."""
        llama, job = self._llama, self.job
        path = gguf_export.ensure(job.config, job.cache_dir, job.seed)
        parameters = _filled(
            llama.llama_model_default_params(),
            load_mode=llama.LLAMA_LOAD_MODE_NONE,
            n_gpu_layers=2 if self._on_cuda else 0,
            main_gpu=int(job.case.device.partition(":")[2] or 0),
            split_mode=llama.LLAMA_SPLIT_MODE_NONE,
        )
        self._model = llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the model; its log says why")

    def compile(self) -> None:
        """The context with its cache and buffers, and the batch with the hidden states."""
        import numpy as np

        shape, width = self.job.case.shape, hidden_size(self.job.config)
        self._context = self._made_context(None)
        self._batch = self._llama.llama_batch_init(shape.tokens, width, 1)
        self._batch.n_tokens = shape.tokens
        states = np.ctypeslib.as_array(self._batch.embd, (shape.tokens, width))
        states[:] = weights.hidden_states(self.job.config, shape, self.job.seed).reshape(-1, width)
        for i in range(shape.tokens):
            self._batch.pos[i] = i % shape.seq_len
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = i // shape.seq_len
            self._batch.logits[i] = 1

    def run(self) -> None:
        """One pass on an empty cache."""
        self._decode(self._context)

    def output(self) -> np.ndarray:
        """What leaves the block, before the model's last norm: seen by a callback, in a context of
        its own, because llama.cpp has no other way to it."""
        import numpy as np
        from llama_cpp._ggml import libggml

        libggml.ggml_get_name.restype = ctypes.c_char_p
        libggml.ggml_nbytes.restype = ctypes.c_size_t
        sizes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
        libggml.ggml_backend_tensor_get.argtypes = sizes
        found: list[np.ndarray] = []

        def see(tensor: int, ask: bool, _: Any) -> bool:
            place = ctypes.c_void_p(tensor)
            ours = libggml.ggml_get_name(place) == _OUTPUT
            if ours and not ask:
                part = np.empty(libggml.ggml_nbytes(place) // 4, np.float32)
                libggml.ggml_backend_tensor_get(tensor, part.ctypes.data, 0, part.nbytes)
                found.append(part)
            return ours or not ask

        # Kept: llama.cpp has the address alone.
        callback = self._llama.ggml_backend_sched_eval_callback(see)
        context = self._made_context(callback)
        self._decode(context)
        self._llama.llama_free(context)
        shape = self.job.case.shape
        return np.concatenate(found).reshape(shape.batch_size, shape.seq_len, -1)

    def settings(self) -> Mapping[str, Setting]:
        """The context's parameters."""
        return {
            "weight_format": "Q4_0",
            "activation_format": "Q8_0" if not self._on_cuda else "chosen by llama.cpp's kernels",
            "dtype": "float16",
            "n_ubatch": self._at_once(),
            "flash_attn": True,
            "kv_cache": "f16, unified",
            "load_mode": "none",
            "vocabulary": gguf_export.VOCABULARY,
            "threads": len(os.sched_getaffinity(0)),
        }

    def categories(self) -> Mapping[str, int]:
        """Bytes that the loaded model has, less what stands beside the layer."""
        other = gguf_export.other_bytes(self.job.config)
        held = self._llama.llama_model_size(self._model) - other
        return {"weights": held, "vocabulary_and_outer_norms": other}

    def _made_context(self, see: Any) -> Any:
        llama, shape = self._llama, self.job.case.shape
        threads = len(os.sched_getaffinity(0))
        parameters = _filled(
            llama.llama_context_default_params(),
            n_ctx=shape.tokens,
            n_batch=shape.tokens,
            n_ubatch=self._at_once(),
            n_seq_max=shape.batch_size,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn_type=llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            pooling_type=llama.LLAMA_POOLING_TYPE_NONE,
            embeddings=True,
            kv_unified=True,
            **({} if see is None else {"cb_eval": see}),
        )
        context = llama.llama_init_from_model(self._model, parameters)
        if not context:
            # It says why on stderr only; a buffer that could not be had is the usual reason.
            raise OutOfMemoryError("llama.cpp could not make its context; its log says why")
        return context

    def _decode(self, context: Any) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(context), True)
        status = self._llama.llama_decode(context, self._batch)
        self._llama.llama_synchronize(context)
        if status:
            raise RuntimeError(f"llama_decode returned {status}; llama.cpp's log says why")

    def _at_once(self) -> int:
        return min(_TOKENS_AT_ONCE, self.job.case.shape.tokens)


def _filled(parameters: Any, **values: Any) -> Any:
    """The parameters with these values; ctypes would take a field that llama.cpp does not have."""
    unknown = set(values) - {name for name, *_ in parameters._fields_}
    if unknown:
        raise RuntimeError(f"this llama.cpp has no parameters {', '.join(sorted(unknown))}")
    for name, value in values.items():
        setattr(parameters, name, value)
    return parameters


def _through(values: torch.Tensor, kind: Any) -> torch.Tensor:
    """The values as the format keeps them, by GGUF's own reference in numpy."""
    import torch
    from gguf import quants

    packed = quants.quantize(values.detach().float().numpy(), kind)
    return torch.from_numpy(quants.dequantize(packed, kind)).view(values.shape)


FRAMEWORK = LlamaCpp()
