"""Small models of our own with the class names, module names and call signatures of remote code on the Hub.

Remote code is not downloaded by tests. Weights are random; what is modelled is the interface and which positions see
which.
"""
