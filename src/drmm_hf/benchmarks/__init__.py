"""Measurements of speed and memory, each against a yardstick in the same run."""
