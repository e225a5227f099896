"""Makers of what the package embeds: images, autoencoder, classifier, checkpoint."""
