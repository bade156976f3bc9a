"""One thread, and hypothesis profiles: ``ci`` (the default) draws the same examples every time,
``--hypothesis-profile=search`` draws new ones, more of them, ``quick`` fails without shrinking."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

_COMMON = dict(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.register_profile("ci", derandomize=True, database=None, max_examples=300, **_COMMON)
settings.register_profile("search", max_examples=2000, **_COMMON)
settings.register_profile(
    "quick",
    derandomize=True,
    database=None,
    max_examples=300,
    phases=[Phase.explicit, Phase.generate],
    **_COMMON,
)
settings.load_profile("ci")
