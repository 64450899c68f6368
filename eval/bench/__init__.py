"""Benchmarks: attention, streaming, rollouts of every memory, prompts that change, recall of the selector"""
