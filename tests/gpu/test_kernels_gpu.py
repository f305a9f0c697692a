"""The kernels' own tests, on the GPU: compiled, and with PTX where a format has some."""

from tests.unit.test_kernels_cuda import *  # noqa: F403
from tests.unit.test_kernels_pointwise import *  # noqa: F403
from tests.unit.test_kernels_window import *  # noqa: F403
