"""Training of `mini-llama`: a miniature Llama that writes Python, trained on the standard library's source."""
