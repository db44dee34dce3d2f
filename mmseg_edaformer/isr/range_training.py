"""Training one checkpoint for many ISR ratios."""
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .ratio import ISRRatio


class RatioRange:
    """The ratios for which a training prepares a model.

    Each step passes its images twice: the trained model learns from the labels, and the model at
    one of these ratios learns from the first pass (the sandwich of Universally Slimmable Networks,
    arXiv 1903.05134, without its smallest network at every step). The paper fine-tunes for one
    ratio (table 4).

    Args:
        isr_ratios: Values for `ISRRatio.parse`, of which every rank draws one for every step.
        weight: Weight of the `consistency` loss.

    Raises:
        ConfigError: The list is empty, or the weight is negative.
        RatioError: A ratio is not valid.
    """

    def __init__(self, isr_ratios: Sequence[int | str], weight: float = 1.) -> None:
        if isinstance(isr_ratios, (str, int)) or not isr_ratios:
            raise ConfigError(f'isr_range.isr_ratios={isr_ratios!r}: give a list of at least one '
                              'ratio')
        if weight < 0:
            raise ConfigError(f'isr_range.weight={weight}: it must not be negative')
        self.isr_ratios = [ISRRatio.parse(ratio) for ratio in isr_ratios]
        self.weight = weight

    def draw(self) -> ISRRatio:
        """One of the ratios, each equally likely, from torch's generator."""
        return self.isr_ratios[int(torch.randint(len(self.isr_ratios), ()))]


def same_draws(like: Tensor) -> AbstractContextManager[None]:
    """Save the state of torch's generators, and restore it on entering the ``with`` block.

    Two passes then drop the same paths and channels, so that only the ratio differs.

    Args:
        like: A tensor on the device whose generator is saved, besides that of the CPU.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(like.device) if like.is_cuda else None

    @contextmanager
    def again() -> Iterator[None]:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, like.device)
        yield

    return again()


def consistency(reduced: Tensor, full: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the class probabilities, averaged over pixels, in nats.

    Args:
        reduced: Logits N x C x H x W of the pass that learns.
        full: Logits of the pass that it learns from, which gets no gradient.
    """
    target = full.detach().float().log_softmax(1)
    divergence = F.kl_div(reduced.float().log_softmax(1), target, reduction='none',
                          log_target=True)
    return divergence.sum(1).mean()
