"""Compiled networks, for one image size or for many."""
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def compile_model(model: nn.Module, *, fixed_size: bool = False, frozen: bool = False,
                  graphs: bool = False) -> None:
    """Compile the backbone and the decode head of a segmentor, in place.

    mmengine's own ``compile`` of the whole fails in the optimizer's step. Weights, their names and
    ``apply_isr`` work as before; a new ratio compiles again.

    Args:
        model: A segmentor, or a wrapper such as test-time augmentation around one.
        fixed_size: Whether all images have one size. It compiles for each size that comes, and on
            GPUs replays a CUDA graph, which saves launching kernels one by one. Without it, the
            second size compiles code for every size.
        frozen: Whether the weights never change after the first image, so that they are built into
            the code and, on CPUs, packed for the kernels. Not for training.
        graphs: Whether to replay PyTorch's own kernels as a CUDA graph for each image size and
            ratio on a GPU, and generate no code: ready in seconds, and best for small images.
    """
    segmentor: Any = model
    while not hasattr(segmentor, 'backbone'):
        segmentor = segmentor.module
    on_gpu = next(segmentor.parameters()).is_cuda
    options: dict[str, Any] = {}
    if frozen and not on_gpu:
        options['freezing'] = True
    if fixed_size and on_gpu:
        options['triton.cudagraphs'] = True
    settings: dict[str, Any] = dict(dynamic=False if fixed_size else None, options=options or None)
    if graphs:
        settings = dict(dynamic=False, backend=cuda_graphs)
    for part in (segmentor.backbone, segmentor.decode_head):
        # Not part.compile(): mmseg's heads call self.forward, which that leaves as it is.
        forward = torch.compile(part.forward, **settings)
        part.forward = _copying(forward) if on_gpu and fixed_size else forward


def _copying(forward: Callable[..., Any]) -> Callable[..., Any]:
    # The decode head's CUDA graph would overwrite the backbone's maps before it reads them, for
    # which torch raises (pytorch/pytorch#160281).
    @functools.wraps(forward)  # keeps torch's mark of compiled functions
    def copied(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, Tensor.clone, forward(*args, **kwargs))
    return copied


def cuda_graphs(network: Callable[..., Sequence[Tensor]], _: Any) -> Callable[..., Any]:
    """Replay a traced network as a CUDA graph at inference: a backend of ``torch.compile``.

    torch's own backend of this kind copies all weights for each replay. This one reads them in
    place, and records the graph again when they have moved. torch.compile guarantees that sizes,
    types and all that the Python code depends on, such as the ISR ratio, are those traced.
    """
    if torch.is_grad_enabled():
        return network
    replay: Callable[..., Sequence[Tensor]] | None = None
    places: list[int] = []

    def run(*inputs: Any) -> Any:
        nonlocal replay, places
        weights = [x for x in inputs if isinstance(x, nn.Parameter)]
        if not weights or not weights[0].is_cuda:
            return network(*inputs)
        current = [weight.data_ptr() for weight in weights]
        if replay is None or current != places:
            replay, places = _record(network, inputs), current
        return replay(*inputs)
    return run


def _record(network: Callable[..., Sequence[Tensor]],
            inputs: Sequence[Any]) -> Callable[..., Sequence[Tensor]]:
    own = [x.clone() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x
           for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose their kernels in these calls
        for _ in range(2):
            network(*own)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = network(*own)

    def replay(*inputs: Any) -> Sequence[Tensor]:
        for mine, given in zip(own, inputs):
            if mine is not given and isinstance(mine, Tensor):
                mine.copy_(given)
        graph.replay()
        return [output.clone() for output in outputs]
    return replay
