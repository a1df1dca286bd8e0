"""Training with Accelerate: recipes, optimiser, averaging, checkpoints and one visible loop."""
