"""The model: a flat folder, published as it is as remote code. Imports torch, torchvision and transformers only."""
