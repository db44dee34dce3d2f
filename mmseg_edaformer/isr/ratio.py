"""How much further keys and queries are pooled at inference, stage by stage."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ..errors import RatioError

NONE, AUTO = 'none', 'auto'
"""Names of the trained model, and of the ratio that follows the size of the image."""

NAMES = {NONE: '1', 'optimal': '2211-222'}
"""Ratios of keys by name; `optimal` is the paper's choice (table 1)."""

_QUERIES = '+q'

_VALID = ('Use one integer from 1 up for every stage (2), a multiplier for each encoder stage and '
          'then for each decoder stage, shallow to deep (2211-222, or 2,2,1,1-2,2,2 for numbers '
          'above 9), or a name ({})')

LARGEST = 10 ** 6
"""Largest multiplier; no map is larger."""


@dataclass(frozen=True)
class StageRatio:
    """Multipliers of the stages of an encoder and a decoder, from the shallowest to the deepest.

    A part with a single multiplier uses it for all of its stages. 1 everywhere is the trained
    model, and prints as ``none``.

    With ``auto`` the multipliers are 1 at the size of the training images, and each layer chooses
    its own for larger images, so that its number of tokens stays near that of training:
    `multiplier_near` is the rule.
    """
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    auto: bool = False

    knob: ClassVar[str]
    names: ClassVar[dict[str, str]]

    def __post_init__(self) -> None:
        for part in (self.encoder, self.decoder):
            if not isinstance(part, tuple) or not part:
                raise RatioError(f'{self.knob} {part!r:.60}: each part needs at least one '
                                 f'multiplier. {self._valid()}')
            for value in part:
                if isinstance(value, bool) or not isinstance(value, int) or (
                        not 1 <= value <= LARGEST):
                    raise RatioError(f'{self.knob} {value!r:.60} is not an integer from 1 to '
                                     f'{LARGEST}. {self._valid()}')
        if self.auto and {*self.encoder, *self.decoder} != {1}:
            raise RatioError(f'{self.knob} {AUTO} takes no multipliers. {self._valid()}')

    @classmethod
    def parse(cls, value: 'Self | int | str') -> Self:
        """Parse the ratio of a config or a command line."""
        if isinstance(value, cls):
            return value
        if isinstance(value, int):
            return cls((value,), (value,))
        if not isinstance(value, str):
            raise RatioError(f'cannot parse {cls.knob} {value!r:.60}, a {type(value).__name__}. '
                             f'{cls._valid()}')
        if value.strip().lower() == AUTO:
            return cls((1,), (1,), auto=True)
        text = cls.names.get(value.strip().lower(), value.strip())
        parts = text.split('-')
        # A long number is one part of a list of multipliers, not a multiplier for all stages.
        if len(parts) == 1 and text.isdecimal() and len(text) < 3:
            return cls.parse(int(text))
        if len(parts) != 2:
            raise RatioError(f'cannot parse {cls.knob} {value!r:.60}. {cls._valid()}')
        return cls(cls._multipliers(parts[0], value), cls._multipliers(parts[1], value))

    @classmethod
    def _parse_encoder(cls, text: str) -> Self:
        numbers = text.strip()
        if '-' not in text and (',' in text or (len(numbers) > 2 and numbers.isdecimal())):
            text = f'{numbers}-111'
        ratio = cls.parse(text)
        return ratio if len(ratio.encoder) == 1 else cls(ratio.encoder, (1, 1, 1))

    def for_stages(self, part: str, count: int) -> tuple[int, ...]:
        """The multipliers of 'encoder' or 'decoder', one for each of its ``count`` stages."""
        multipliers: tuple[int, ...] = getattr(self, part)
        if len(multipliers) == 1:
            return multipliers * count
        if len(multipliers) != count:
            raise RatioError(f'{self.knob} {self!s:.60} has {len(multipliers)} multipliers for '
                             f'the {part}, which has {count} stages in this model. '
                             f'{self._valid()}')
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

    @classmethod
    def _valid(cls) -> str:
        return _VALID.format(', '.join((*cls.names, AUTO)))

    @classmethod
    def _multipliers(cls, part: str, value: str) -> tuple[int, ...]:
        numbers: Sequence[str] = part.removesuffix(',').split(',') if ',' in part else part
        if not numbers or not all(
                number.strip().isdecimal() and len(number.strip()) < 10 for number in numbers):
            raise RatioError(f'cannot parse {cls.knob} {value!r:.60}. {cls._valid()}')
        return tuple(int(number) for number in numbers)


class QueryRatio(StageRatio):
    """Sides of the cells whose queries are averaged, by stage."""
    knob = 'query_ratio'
    names = {NONE: '1'}


_ALL_QUERIES = QueryRatio((1,), (1,))


@dataclass(frozen=True)
class ISRRatio(StageRatio):
    """Multipliers of the training pools of keys, by stage, and the query ratio beside them.

    The order is that of the released command line. The paper prints absolute pools, and the decoder
    from deep to shallow: its [16,8,2,1]-[2,4,8] is 2211-222 here. With a query ratio it prints as
    ``2211-222+q2``, and is parsed again from that.
    """
    queries: QueryRatio = _ALL_QUERIES

    knob = 'isr_ratio'
    names = NAMES

    @classmethod
    def parse(cls, value: 'Self | int | str') -> Self:
        """Parse the ratio of a config or a command line."""
        if not isinstance(value, str) or _QUERIES not in value:
            return super().parse(value)
        keys, _, queries = value.partition(_QUERIES)
        return super().parse(keys).with_queries(queries)

    @classmethod
    def parse_encoder(cls, text: str) -> Self:
        """Parse the ratio of a model without a decoder, for which ``2211`` is enough."""
        keys, plus, queries = text.partition(_QUERIES)
        ratio = cls._parse_encoder(keys)
        return ratio.with_queries(QueryRatio._parse_encoder(queries)) if plus else ratio

    def with_queries(self, query_ratio: QueryRatio | int | str | None) -> Self:
        """The same with another query ratio; None keeps the one that it has."""
        if query_ratio is None:
            return self
        return replace(self, queries=QueryRatio.parse(query_ratio))

    @property
    def follows_size(self) -> bool:
        """Whether it is another ratio for images of another size."""
        return self.auto or self.queries.auto

    def __str__(self) -> str:
        keys = super().__str__()
        queries = str(self.queries)
        return keys if queries == NONE else f'{keys}{_QUERIES}{queries}'


def multiplier_near(wanted: int, total: int, least: int) -> int:
    """The multiplier from ``least`` up that leaves about ``wanted`` of ``total`` tokens.

    It is near the square root of s = total / wanted. It steps from m to m + 1 where s exceeds
    m (m + 1): m leaves s / m^2 of ``wanted``, so from there on m + 1 is closer by factor.
    """
    # Compared step by step, which torch.compile can guard when sizes are dynamic.
    while total > wanted * least * (least + 1):
        least += 1
    return least
