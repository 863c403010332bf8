"""What stands in files beside a model's weights, or in place of them."""
