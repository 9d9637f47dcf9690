"""Kernels with one barrier, mask or bound taken out, of which each has to fail a case of its operators."""
