"""Conversion of public checkpoints and pretrained backbones to this package's names."""
