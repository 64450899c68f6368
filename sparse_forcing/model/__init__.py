"""The model: transformer, attention, rotary positions, selector, text encoders, autoencoders, geometry, flow"""
