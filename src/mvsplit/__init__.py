"""Mean-variance split residuals for very deep diffusion transformers (arXiv 2605.06169)."""

__version__ = "0.1.0"
