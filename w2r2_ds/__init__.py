"""W2R2-DS: fine-tune video LLMs with a geometry branch (What-Where Representation Re-Forming, arXiv 2510.17034)."""

__version__ = "0.1.0"
