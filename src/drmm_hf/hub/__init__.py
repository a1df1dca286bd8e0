"""Publishing: a model folder that loads anywhere, its card, its checks, and the way to the Hub."""

from .bundle import save_bundle


__all__ = ["save_bundle"]
