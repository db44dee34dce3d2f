"""How much further the keys are pooled at inference, stage by stage."""
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RatioError

NONE, AUTO = 'none', 'auto'
"""Names of the trained model, and of the ratio that follows the size of the image."""

NAMES = {NONE: '1', 'optimal': '2211-222'}
"""Ratios by name; `optimal` is the paper's choice (table 1)."""

_VALID = ('Use one integer from 1 up for every stage (2), a multiplier for each encoder stage and '
          'then for each decoder stage, shallow to deep (2211-222, or 2,2,1,1-2,2,2 for numbers '
          f'above 9), or a name ({", ".join((*NAMES, AUTO))})')

_LIMIT = 10 ** 6  # no map is larger

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 60


@dataclass(frozen=True)
class ISRRatio:
    """Multipliers of the training pools, from the shallowest stage to the deepest.

    A part with a single multiplier uses it for all of its stages. 1 everywhere is the trained
    model, and prints as ``none``.

    The order is that of the released command line. The paper prints absolute pools, and the decoder
    from deep to shallow: its [16,8,2,1]-[2,4,8] is 2211-222 here.

    With ``auto`` the multipliers are 1 at the size of the training images, and each layer chooses
    its own for larger images, so that its number of keys stays near that of training:
    `EmbeddingFreeAttention.multiplier` is the rule.
    """
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    auto: bool = False

    def __post_init__(self) -> None:
        for part in (self.encoder, self.decoder):
            if not isinstance(part, tuple) or not part:
                raise RatioError(f'isr_ratio {_brief(part)}: each part needs at least one '
                                 f'multiplier. {_VALID}')
            for value in part:
                if isinstance(value, bool) or not isinstance(value, int) or (
                        not 1 <= value <= _LIMIT):
                    raise RatioError(f'isr_ratio {_brief(value)} is not an integer from 1 to '
                                     f'{_LIMIT}. {_VALID}')
        if self.auto and {*self.encoder, *self.decoder} != {1}:
            raise RatioError(f'isr_ratio {AUTO} takes no multipliers. {_VALID}')

    @classmethod
    def parse(cls, value: 'ISRRatio | int | str') -> 'ISRRatio':
        """Parse the ratio of a config or a command line.

        Raises:
            RatioError: The value is not valid; the message lists what is.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int):
            return cls((value,), (value,))
        if not isinstance(value, str):
            raise RatioError(f'cannot parse isr_ratio {_brief(value)}, a {type(value).__name__}. '
                             f'{_VALID}')
        if value.strip().lower() == AUTO:
            return cls((1,), (1,), auto=True)
        text = NAMES.get(value.strip().lower(), value.strip())
        parts = text.split('-')
        # A long number is one part of a list of multipliers, not a multiplier for all stages.
        if len(parts) == 1 and text.isdecimal() and len(text) < 3:
            return cls.parse(int(text))
        if len(parts) != 2:
            raise RatioError(f'cannot parse isr_ratio {_brief(value)}. {_VALID}')
        return cls(_multipliers(parts[0], value), _multipliers(parts[1], value))

    @classmethod
    def parse_encoder(cls, text: str) -> 'ISRRatio':
        """Read the ratio of a model without a decoder, for which ``2211`` is enough.

        Raises:
            RatioError: It cannot be parsed.
        """
        numbers = text.strip()
        if '-' not in text and (',' in text or (len(numbers) > 2 and numbers.isdecimal())):
            text = f'{numbers}-111'
        ratio = cls.parse(text)
        return ratio if len(ratio.encoder) == 1 else cls(ratio.encoder, (1, 1, 1))

    def for_stages(self, part: str, count: int) -> tuple[int, ...]:
        """The multipliers of 'encoder' or 'decoder', one for each of its ``count`` stages.

        Raises:
            RatioError: The part has another number of multipliers.
        """
        multipliers: tuple[int, ...] = getattr(self, part)
        if len(multipliers) == 1:
            return multipliers * count
        if len(multipliers) != count:
            raise RatioError(f'isr_ratio {self!s:.60} has {len(multipliers)} multipliers for '
                             f'the {part}, which has {count} stages in this model. {_VALID}')
        return multipliers

    def __str__(self) -> str:
        if self.auto:
            return AUTO
        if {*self.encoder, *self.decoder} == {1}:
            return NONE
        if len(self.encoder) == len(self.decoder) == 1 and self.encoder == self.decoder:
            return str(self.encoder[0])
        separator = '' if max(*self.encoder, *self.decoder) < 10 else ','
        # A comma after a single number tells 12 from 1 and 2.
        return '-'.join(separator.join(map(str, part)) + ',' * (len(part) == 1 and part[0] > 9)
                        for part in (self.encoder, self.decoder))


def _brief(value: object) -> str:
    """A value in a few words, however long or deep it is."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python refuses to print numbers of more than 4300 digits
        return 'a number of thousands of digits'


def _multipliers(part: str, value: str) -> tuple[int, ...]:
    numbers: Sequence[str] = part.removesuffix(',').split(',') if ',' in part else part
    if not numbers or not all(
            number.strip().isdecimal() and len(number.strip()) < 10 for number in numbers):
        raise RatioError(f'cannot parse isr_ratio {_brief(value)}. {_VALID}')
    return tuple(int(number) for number in numbers)
