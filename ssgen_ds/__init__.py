"""ssgen-ds: finetune language models on the tokens that they generate themselves, on DeepSpeed."""

__version__ = "0.1.0"
