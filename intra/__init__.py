"""INTRA (arXiv 2605.05806): a frozen encoder-decoder that retrieves from its own representations."""

__version__ = "0.1.0"
