"""One configuration is calculated once, by whichever test asks first."""

import functools
from collections.abc import Callable
from typing import Any

from tests.ranks import RankError


def kept(calculate: Callable[..., Any]) -> Callable[..., Any]:
    """As functools.cache, a RankError included: what is broken fails each of its tests, and only those, without delay."""
    outcomes: dict[tuple, tuple[Any, RankError | None]] = {}

    @functools.wraps(calculate)
    def outcome(*key: Any) -> Any:
        if key not in outcomes:
            try:
                outcomes[key] = calculate(*key), None
            except RankError as error:
                outcomes[key] = None, error
        value, error = outcomes[key]
        if error:
            raise error
        return value

    return outcome
