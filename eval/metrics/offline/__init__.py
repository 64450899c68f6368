"""Metrics of this project that need no weights, or only those of a package"""
