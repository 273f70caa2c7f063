"""Measurements of this machine for everything that plans. Knows kernels and a small engine, no user's model."""
