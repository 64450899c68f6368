"""How the embedded models are made: autoencoder, pretraining, export"""
