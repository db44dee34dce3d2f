"""Where each library keeps the attention whose keys ISR reduces: one file per library."""
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ...models.attention import EmbeddingFreeAttention
from . import edaformer


@dataclass
class Part:
    """An encoder or a decoder with its attention layers, stage by stage, shallow to deep.

    ``stages`` maps the stage's number in the backbone, from 1, to its attention layers.
    """
    kind: str
    stages: dict[int, list[EmbeddingFreeAttention]]

    @staticmethod
    def map_size(stage: int, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a stage's map: a quarter of the image at stage 1, then halves.

        Strided convolutions round up.
        """
        height, width = image_size
        stride = 2 ** (stage + 1)
        return -(-height // stride), -(-width // stride)


def find_parts(model: nn.Module) -> Iterator[Part]:
    """All encoders and decoders within a model that ISR can act on, wrapped ones too."""
    for module in model.modules():
        for kind, stages in edaformer.find(module):
            yield Part(kind, stages)
