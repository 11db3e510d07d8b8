"""Attention: a mask, and its backends. Each backend is one module and one row of `BACKENDS`."""
