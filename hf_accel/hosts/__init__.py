"""The only room that knows private parts of diffusers, transformers and peft."""
