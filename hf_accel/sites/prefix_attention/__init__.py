"""prefix_attention"""
