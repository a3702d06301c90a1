"""spin_ray: self-play fine-tuning (SPIN, arXiv 2401.01335) as one distributed Ray job."""

__version__ = "0.1.0"
