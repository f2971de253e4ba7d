"""Training: the encoder, the LightningModule and its callbacks."""
