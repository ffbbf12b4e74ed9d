"""Properties are checked for what they say, not for how long a busy machine takes."""

from hypothesis import settings

settings.register_profile("longform", deadline=None, derandomize=True)
settings.load_profile("longform")
