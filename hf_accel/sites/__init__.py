"""The places in a model that a method can take, one folder each."""
