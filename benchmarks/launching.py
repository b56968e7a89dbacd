"""Triton without a GPU: a driver in place of CUDA's, for which kernels are compiled, and which starts none of them."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget


class Start(NamedTuple):
    """What the driver was given to start a kernel."""

    kernel: str  # its name, and a hash of its machine code
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]  # all that the kernel has, those that are compiled in among them


class Driver:
    """A GPU of compute capability 9.0 whose device is that of CPU tensors. started: called with each Start."""

    def __init__(self, started: Callable[[Start], None] | None = None) -> None:
        self.device, self.stream, self.started, self.utils = -1, 0, started, self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, binary: bytes, *_: Any) -> tuple[int, str, int, int, int]:
        """Module, function, registers, spills, the most threads."""
        return 1, f"{name} {hashlib.sha256(binary).hexdigest()}", 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def start(x: int, y: int, z: int, stream: int, function: str, packed: Any, data: Any, *given: Any) -> None:
            enter, leave, *arguments = given
            enter(data)
            if self.started is not None:
                self.started(Start(function, (x, y, z), stream, tuple(arguments)))
            leave(data)

        return start
