"""The version, which everything may ask for without importing the catalogue of `llmpy`."""

__version__ = "0.1.0"
