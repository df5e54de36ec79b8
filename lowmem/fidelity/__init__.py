"""What quantization did to the embeddings: reference, figures, report and its page."""
