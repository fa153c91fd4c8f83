"""Python runs this first, in every process of an environment of tests/serving: torchvision becomes importable there."""

import tuning  # noqa: F401 - see tuning/data/torchvision_import.py
