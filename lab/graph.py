"""CUDA graphs: work that is captured once, and from then on launched as one."""

import contextlib

import torch

from lab.console import first_line, warn

TRIALS = 3  # times that work is done before it is captured: compilation, allocations, libraries


class Capture:
    """Captures functions as CUDA graphs, on one stream and in one pool of memory.

    A function that is captured takes no arguments, and reads and writes tensors that stay where
    they are. On a CPU it is returned as it is, so that tests can run what a graph would hold.
    """

    def __init__(self, device):
        self.device, self.stream, self.pool = device, None, None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function):
        """Call function() a few times, as it will be captured."""
        if self.stream is None:
            function()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(TRIALS):
                function()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, function):
        """A function that does what function() does, by one launch. Raises RuntimeError where that
        cannot be captured: it waits for the GPU, for instance."""
        if self.stream is None:
            return function
        graph = torch.cuda.CUDAGraph()
        # the mode: other threads may use CUDA meanwhile
        scope = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        # a capture that fails would leave its stream the current one
        with torch.cuda.stream(self.stream), scope:
            function()
        return graph.replay

    def give_up(self, error):
        """Leave the device as it was before a capture that failed. Returns why, as a phrase."""
        if self.stream is not None:
            index = self.stream.device_index
            torch.cuda.synchronize()
            # the random numbers' state still counts as being captured, and would refuse to be used
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(torch.Generator(self.device).graphsafe_get_state())
            # so does the memory, before torch 2.12 (pytorch#180395), and would not be given back
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, self.pool)
            torch.cuda.empty_cache()
        return first_line(error)[:150]


def captured(function, device):
    """A function as one CUDA graph; as it is, with a warning, where it cannot be captured."""
    capture = Capture(device)
    try:
        capture.warm_up(function)
        return capture.capture(function)
    except RuntimeError as error:
        warn(f"no CUDA graph ({capture.give_up(error)}); going on without")
        return function
