"""Concertina: an elastic home for Mixture-of-Experts models on a Ray cluster."""

__version__ = "0.1.0"
