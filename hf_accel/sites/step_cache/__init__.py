"""step_cache"""
