"""From a request, a file, a Hub repo or the shipped configs to methods with settings."""
