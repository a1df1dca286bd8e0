"""Measuring detectors: predictions of any transformers detector, AP and calibration.

Ground truth always comes from the untouched annotations (crowds, areas and ids included), never from processed
labels, and no module here knows a model class.
"""
