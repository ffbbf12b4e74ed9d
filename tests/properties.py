"""On how many examples a property is tried."""

from hypothesis import settings

MOST_WHEN_FAST = 20


def examples(count: int) -> settings:
    """So many, of which `make test-fast` tries the first few."""
    fast = settings.get_current_profile_name() == "fast"
    return settings(max_examples=min(count, MOST_WHEN_FAST) if fast else count)
