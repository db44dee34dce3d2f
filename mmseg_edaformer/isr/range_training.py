"""Training one checkpoint for many ISR ratios."""
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .ratio import ISRRatio


class RatioRange:
    """The ratios that a training prepares a model for.

    Each step passes its images twice: as the model is, against the labels, and at one ratio of
    these, against the first pass (the sandwich of Universally Slimmable Networks, arXiv 1903.05134,
    without its smallest network at every step). The paper fine-tunes for one ratio (table 4).

    Args:
        ratios: What `ISRRatio.parse` reads, each; one is drawn for every step, on every rank.
        weight: Of the `consistency` beside the loss of the labels.

    Raises:
        ConfigError: There is no ratio, or a negative weight.
        RatioError: A ratio means nothing.
    """

    def __init__(self, ratios: Sequence[int | str], weight: float = 1.) -> None:
        if isinstance(ratios, (str, int)) or not ratios:
            raise ConfigError(f'isr_range.ratios={ratios!r}: list one ratio or more')
        if weight < 0:
            raise ConfigError(f'isr_range.weight={weight}: it must not be negative')
        self.ratios = [ISRRatio.parse(ratio) for ratio in ratios]
        self.weight = weight

    def draw(self) -> ISRRatio:
        """One of the ratios, each as likely, from torch's generator."""
        return self.ratios[int(torch.randint(len(self.ratios), ()))]


def same_draws(like: Tensor) -> AbstractContextManager[None]:
    """Note the state of torch's generators; within the ``with`` block they draw from there again.

    Two passes then drop the same paths and channels, and differ by what is to be compared alone.

    Args:
        like: A tensor on the device whose generator counts, beside that of the CPU.
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
    """Kullback-Leibler divergence of the classes of pixels, mean over pixels, in nats.

    Args:
        reduced: Logits N x C x H x W of the pass that learns.
        full: Those of the pass that it learns from, which gets no gradient.
    """
    target = full.detach().float().log_softmax(1)
    divergence = F.kl_div(reduced.float().log_softmax(1), target, reduction='none',
                          log_target=True)
    return divergence.sum(1).mean()
