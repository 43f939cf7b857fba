"""The profile of the fuzz tests that tries many examples: ``--hypothesis-profile slow``."""

from hypothesis import settings

settings.register_profile("slow", max_examples=1_000)
