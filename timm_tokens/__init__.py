"""Better and cheaper tokens for the Vision Transformers in timm."""

__version__ = "0.1.0"
