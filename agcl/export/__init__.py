"""A run's model as a folder in Hugging Face's or PEFT's format, with a model card and the importance files."""

from .finding import Trained, find_trained
from .writing import export_model

__all__ = ["Trained", "export_model", "find_trained"]
