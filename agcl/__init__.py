"""Attribution-guided continual learning for large language models (arXiv 2605.05285)."""

__version__ = "0.1.0"
